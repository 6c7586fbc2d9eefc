"""Where a run starts: who holds its directory, which checkpoint it goes on from, what has changed.

Rank 0 decides, since file systems may lag behind on other nodes, and all ranks hear of it: they start
alike or leave alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from agrivision import checkpoint
from agrivision.config import Config, flatten
from agrivision.distributed import Ranks
from agrivision.errors import AgrivisionError, BadInput, RunMismatch
from agrivision.rundir import RunDirectory
from agrivision.training import provenance
from agrivision.training.record import forget_after

log = logging.getLogger(__name__)

# Keys that change nothing of what is computed: a run may go on with others.
_FREE_KEYS = (
    "data.path",
    "data.threads",
    "data.prefetch",
    "data.stage",
    "monitor.",
    "training.keep_",
    "training.checkpoint_every_",
)


@contextmanager
def held(run: RunDirectory, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """The run directory, held by rank 0 for all while the block runs.

    Yields:
        A check that raises Superseded where a later attempt has taken the directory over; ranks other
        than 0, which write nothing that counts, have nothing to check.

    Raises:
        AgrivisionError: it cannot be had; all ranks leave with the same exit code.
    """
    with ExitStack() as stack:
        error, check = None, _nothing
        if ranks.world.is_main:
            try:
                check = stack.enter_context(run.held(ranks.world)).check
            except AgrivisionError as refusal:
                error = refusal
        _agree_to_start(ranks, error)
        yield check


def _nothing() -> None:
    return


def find_start(
    config: Config, run: RunDirectory, ranks: Ranks, fingerprint: str, *, resume_with_changes: bool
) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, after removing what was written about later steps.

    Args:
        config: of the run that starts.
        run: its directory, held.
        ranks: connected.
        fingerprint: of the data set.
        resume_with_changes: go on although the configuration or the data set differs.

    Returns:
        None for a run that begins.

    Raises:
        RunMismatch: the directory belongs to another run; the line names the keys.
        CheckpointError: there are checkpoints, but none is whole.
    """
    found, error = None, None
    if ranks.world.is_main:
        try:
            found = checkpoint.latest(run.checkpoints)
            if found is not None:
                _compare(config, run, fingerprint, resume_with_changes)
                checkpoint.set_aside(run.checkpoints, found.step)
            forget_after(run, 0 if found is None else found.step)
        except AgrivisionError as refusal:
            error = refusal
    _agree_to_start(ranks, error)
    name = ranks.from_main(None if found is None else found.folder.name)
    if name is None or found is not None:
        return found
    return checkpoint.load(_wait_for(run.checkpoints / name))


def _agree_to_start(ranks: Ranks, error: AgrivisionError | None) -> None:
    """Leave on all ranks, with the same exit code, if rank 0 met an error."""
    said = ranks.from_main(None if error is None else {"line": str(error), "code": error.exit_code})
    if error is not None:
        raise error
    if said is not None:
        noun = BadInput if said["code"] == BadInput.exit_code else AgrivisionError
        raise noun(f"rank 0 cannot start: {said['line']}")


def _wait_for(folder: Path, seconds: float = 60.0) -> Path:
    """A folder that another node has just written; NFS may show it up to half a minute late."""
    end = time.monotonic() + seconds
    while not (folder / checkpoint.MANIFEST).is_file() and time.monotonic() < end:
        time.sleep(0.5)
    return folder


def _compare(config: Config, run: RunDirectory, fingerprint: str, resume_with_changes: bool) -> None:
    """Refuse, or say, what differs from the run that the directory belongs to."""
    changes = _differences(config, run)
    attempts = provenance.attempts(run)
    before = attempts[-1].get("data_fingerprint") if attempts else None
    if before is not None and before != fingerprint:
        changes.append(
            f"the data set in {config.data.path} is another one (fingerprint {fingerprint[:12]})"
        )
    if not changes:
        return
    said = "; ".join(changes)
    if not resume_with_changes:
        raise RunMismatch(
            f"{run.path} belongs to another run: {said}. Choose another --run_dir, restore the values,"
            " or pass --resume_with_changes"
        )
    log.warning("going on with changes: %s", said)


def _differences(config: Config, run: RunDirectory) -> list[str]:
    try:
        before = flatten(yaml.safe_load(run.config.read_text()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise RunMismatch(f"cannot read {run.config}: {error}") from None
    now = flatten(config.to_dict())
    keys = sorted(key for key in before.keys() | now.keys() if not key.startswith(_FREE_KEYS))
    missing = object()
    return [
        f"{key} was {before.get(key, 'not there')!r} and is {now.get(key, 'not there')!r}"
        for key in keys
        if before.get(key, missing) != now.get(key, missing)
    ]
