"""`python -m seg4diff`: the command line."""

import sys

from seg4diff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
