"""`python -m sparsmith`."""

import sys

from sparsmith.cli import main

sys.exit(main())
