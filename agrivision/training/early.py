"""Whether a run has stopped getting better, by the scores that it has written down."""

from __future__ import annotations

from collections.abc import Mapping

from agrivision.config import TrainingConfig


def exhausted(
    config: TrainingConfig, scores: Mapping[int, float | None], step: int, total: int
) -> str | None:
    """Why a run ends at a step, before its last one; None where it goes on.

    A function of the scores alone, so that a run that was interrupted decides as one that never was.

    Args:
        config: how patient the run is.
        scores: mIoU of all evaluations by step, None where no class was there. Those of later steps do
            not count.
        step: that was just evaluated.
        total: steps of the whole run.
    """
    if config.patience is None or step >= total:
        return None
    best: float | None = None
    at, waited = 0, 0
    for when in sorted(when for when in scores if when <= step):
        score = scores[when]
        if score is not None and (best is None or score > best + config.min_improvement):
            best, at, waited = score, when, 0
        else:
            waited += 1
    if waited < config.patience:
        return None
    known = "no mIoU at all" if best is None else f"no mIoU better than the {best:.4f} of step {at}"
    return f"{known} in {waited} evaluations (training.patience): ends at step {step} of {total}"
