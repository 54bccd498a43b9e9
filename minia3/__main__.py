"""The command line of the package: `python -m minia3 ...`, or `minia3 ...` once it is installed."""

import sys

from minia3.files.program import begin


def main():
    """Run the command line of this process, and return its exit code."""
    begin("minia3")
    from minia3.cli.main import main  # takes a while, and Ctrl-C may come meanwhile

    return main()


if __name__ == "__main__":
    sys.exit(main())
