"""`python -m nanoadam` is the command `nanoadam`."""

import sys

from nanoadam.cli import main

sys.exit(main())
