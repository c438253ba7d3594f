"""`python -m stablekd_fast` is the `stablekd` command."""

import sys

from stablekd_fast.cli import main

sys.exit(main())
