"""The command line of the package: `python -m minia3 ...`."""

import sys

from minia3.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
