"""The clusters of tests/slurm, for pages that submit jobs."""

from __future__ import annotations

from tests.slurm.conftest import clusters, slurm, started

__all__ = ["clusters", "slurm", "started"]
