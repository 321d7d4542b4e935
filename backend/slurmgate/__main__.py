"""``python -m slurmgate``: the same as the ``slurmgate`` command."""

import sys

from slurmgate.cli import main

if __name__ == "__main__":
    sys.exit(main())
