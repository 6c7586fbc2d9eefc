"""`python -m agrivision` is `agrivision`."""

from __future__ import annotations

import sys

from agrivision.training.preemption import hear_early

# A signal that comes while the commands are still being imported must not end a rank of a job.
hear_early(sys.argv[1:])

from agrivision.cli import main  # noqa: E402

sys.exit(main())
