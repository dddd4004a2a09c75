"""`python -m proxyq`."""

import sys

from proxyq.cli import main

if __name__ == "__main__":
    sys.exit(main())
