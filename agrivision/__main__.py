"""`python -m agrivision` is `agrivision`."""

from __future__ import annotations

import sys

from agrivision.cli import main

sys.exit(main())
