"""The `rac3` command, and `python -m rac3`: says at once that it starts, since what it imports takes seconds."""

import sys


def main() -> None:
    """`rac3.cli.main`, after a line on a terminal."""
    if len(sys.argv) > 1 and sys.stderr.isatty():
        print(f"rac3 {sys.argv[1]}: starting", file=sys.stderr, flush=True)
    import rac3.cli

    rac3.cli.main()


if __name__ == "__main__":
    main()
