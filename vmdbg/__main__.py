"""`python -m vmdbg`."""

import sys

from vmdbg.cli import main

sys.exit(main())
