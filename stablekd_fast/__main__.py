import sys

from stablekd_fast.cli import main

sys.exit(main())
