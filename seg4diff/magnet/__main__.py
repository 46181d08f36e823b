"""``accelerate launch -m seg4diff.magnet``: the same as ``seg4diff train``."""

import sys

from seg4diff.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
