"""`python -m dori_utils` is the command `dori`."""

import sys

from dori_utils.cli.main import main

sys.exit(main())
