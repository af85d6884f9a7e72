"""``python -m sparselottery`` is the command ``sparselottery``."""

import sys

from .cli import main

sys.exit(main())
