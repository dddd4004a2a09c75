"""The command line: `main` runs one command and returns its exit code.

Nothing heavy is imported before a command needs it: `--help` knows neither jax nor torch.
"""

from proxyq.cli.app import main as main
