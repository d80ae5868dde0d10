"""``python -m difftune.cli``."""

import sys

from difftune.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
