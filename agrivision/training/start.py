"""Where a run starts: who holds its directory, which checkpoint it goes on from, what has changed.

Rank 0 decides, since file systems may lag behind on other nodes, and all ranks hear of it: they start
alike or leave alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from agrivision import checkpoint
from agrivision.config import Config, flatten
from agrivision.data.schema import FILE_NAME
from agrivision.distributed import Ranks
from agrivision.errors import (
    AgrivisionError,
    BadInput,
    CheckpointError,
    PeerLost,
    RunMismatch,
    StorageError,
)
from agrivision.late import SECONDS, await_seen, is_late, refresh
from agrivision.rundir import RunDirectory
from agrivision.storage import make_private
from agrivision.training import provenance
from agrivision.training.record import forget_after
from agrivision.world import World

_LISTING_SECONDS = 35.0  # NFS shows a new file about half a minute late

log = logging.getLogger(__name__)

# Keys that change nothing of what is computed: a run may go on with others.
_FREE_KEYS = (
    "data.path",
    "data.threads",
    "data.prefetch",
    "data.stage",
    "data.max_damaged_share",
    "monitor.",
    "training.keep_",
    "training.checkpoint_every_",
    "training.stall_minutes",
    "training.save_patience_",
)


def await_data_set(config: Config, world: World) -> None:
    """On other nodes than rank 0's, wait for a data set that was just made and is seen late there."""
    if not world.is_main and config.data.path:
        with suppress(OSError):  # whoever opens it says what is wrong
            await_seen((Path(config.data.path) / FILE_NAME).stat, is_late, _LISTING_SECONDS)


def make_run_directory(run: RunDirectory, world: World) -> None:
    """Make the run directory; another node than rank 0's may see late that it is there already.

    Raises:
        StorageError, NotWritable: the disk refused.
        Untrusted: somebody else made the directory, or may write it.
    """
    seconds = 0.0 if world.is_main else SECONDS
    await_seen(lambda: make_private(run.path), is_late, seconds)


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
        StorageError: the disk refused, or this node does not see what rank 0 sees.
    """
    found, error = None, None
    if ranks.world.is_main:
        try:
            attempts = provenance.attempts(run)
            _await_listing(run)
            found = checkpoint.latest(
                run.checkpoints, lambda entry: provenance.went_on(attempts, entry.attempt, entry.step)
            )
            if found is not None:
                _compare(config, run, fingerprint, resume_with_changes)
                checkpoint.set_aside(run.checkpoints, found.step)
            forget_after(run, 0 if found is None else found.step)
        except AgrivisionError as refusal:
            error = refusal
    _agree_to_start(ranks, error)
    name = ranks.from_main(None if found is None else found.folder.name)
    whose = ranks.from_main(fingerprint)
    try:
        if whose != fingerprint:
            raise StorageError(f"{config.data.path} is another data set here than on rank 0's node")
        if name is not None and found is None:
            found = _load_late(run.checkpoints / name)
    except StorageError as refusal:
        error = refusal
    if ranks.largest(int(error is not None))[0]:
        raise error or PeerLost("another rank does not see what rank 0 sees: see its own line")
    return found


def _await_listing(run: RunDirectory) -> None:
    """Give a checkpoint that there must be the time to be seen on this node.

    What has a score was saved before it. Where somebody has removed it since, that costs some waiting.
    """
    refresh(run.checkpoints)
    refresh(run.log)
    try:
        scored = max(run.evaluations(), default=0)
    except OSError as error:
        raise StorageError(f"cannot read {run.metrics}: {error.strerror}") from error
    if run.latest_step() >= scored:
        return
    log.warning("step %d was scored, but its checkpoint is not here: waiting for it", scored)

    def look() -> None:
        refresh(run.checkpoints)
        if run.latest_step() < scored:
            raise FileNotFoundError

    try:
        await_seen(look, is_late, _LISTING_SECONDS)
    except FileNotFoundError:
        log.warning("it does not come: going on without it")


def _load_late(folder: Path) -> checkpoint.Checkpoint:
    """The checkpoint that rank 0 has read; this node may see it late."""
    try:
        return await_seen(lambda: checkpoint.load(folder), _is_damage, SECONDS)
    except CheckpointError as error:
        raise StorageError(f"rank 0 can read the checkpoint, this node cannot: {error}") from None


def _is_damage(error: Exception) -> bool:
    return isinstance(error, CheckpointError)


def _agree_to_start(ranks: Ranks, error: AgrivisionError | None) -> None:
    """Leave on all ranks, with the same exit code, if rank 0 met an error."""
    said = ranks.from_main(None if error is None else {"line": str(error), "code": error.exit_code})
    if error is not None:
        raise error
    if said is not None:
        noun = BadInput if said["code"] == BadInput.exit_code else AgrivisionError
        raise noun(f"rank 0 cannot start: {said['line']}")


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
    # What a run of an earlier version could not say yet was as it is by default.
    before = flatten(Config().to_dict()) | before
    keys = sorted(key for key in before.keys() | now.keys() if not key.startswith(_FREE_KEYS))
    missing = object()
    return [
        f"{key} was {before[key]!r} and is {now.get(key, 'not there')!r}"
        for key in keys
        if before[key] != now.get(key, missing)
    ]
