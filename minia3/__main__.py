"""The command line of the package: `minia3 ...`, or `python -m minia3 ...`."""

import sys


def main():
    """Return the exit code. Ctrl-C ends in one line, even while modules are imported."""
    try:
        from minia3.cli.main import main as run_command

        return run_command()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
