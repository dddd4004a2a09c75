"""proxyq: a bit-width for every layer of a trained network, in seconds, without training."""

from proxyq.version import __version__ as __version__
