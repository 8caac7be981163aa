"""`python -m resgrid`: the command line where the package is not installed, only on PYTHONPATH."""

import sys

from resgrid.cli import main

sys.exit(main())
