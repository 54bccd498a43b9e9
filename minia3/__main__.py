"""The command line of the package: `python -m minia3 ...`, or `minia3 ...` once it is installed."""

import sys

from minia3.files.program import begin, end, keep_freed_memory


def main():
    """Run the command line of this process, and return its exit code."""
    begin("minia3")
    if sys.argv[1:2] == ["predict"]:  # it computes batch after batch, and all of them are alike
        keep_freed_memory()
    from minia3.cli.main import main  # takes a while, and Ctrl-C may come meanwhile

    try:
        return main()
    finally:
        end()


if __name__ == "__main__":
    sys.exit(main())
