"""What a run that went through a storm and one that nothing disturbed must have in common.

Each function returns what differs, a line each; nothing where all is well.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from agrivision import checkpoint
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import CheckpointError
from tests.training.runs import TIMINGS, last_bits, metrics, samples

# An allocator's leftovers, and what a checkpoint was read into. The processes take 800 MiB.
_SLACK_KIB = 48 << 10
_SHARDS = 8  # no split of the data sets here has more
_WORDS_BYTES = 1 << 20  # logs, provenance, the configuration in each event file
_ASIDE = "damaged-"
_LAST_LINE = re.compile(r"^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception|Interrupt)\b.*)", re.MULTILINE)
_HALF = re.compile(r"(^|/)\.(?!lock$)|\.part$|\.gone$|\.tmp$")


def differences(run_dir: Path, reference: Path, dataset: Path, damaged: Collection[str]) -> list[str]:
    """What two runs do not have in common that they must.

    Args:
        run_dir: that was disturbed.
        reference: that was not.
        dataset: of both.
        damaged: names of the checkpoints that somebody has damaged.
    """
    return [
        *_other("weights, optimiser, average and progress", last_bits(run_dir), last_bits(reference)),
        *_other("samples", samples(run_dir), samples(reference)),
        *_other("rows of metrics.jsonl", metrics(run_dir), metrics(reference)),
        *_other("curves and pictures", events(run_dir), events(reference)),
        *_not_once(run_dir, dataset),
        *_damaged_checkpoints(run_dir, damaged),
        *leftovers(run_dir),
        *_fat(run_dir, reference),
    ]


def _other(name: str, mine: Any, theirs: Any) -> list[str]:
    if mine == theirs:
        return []
    pairs = _pairs(mine, theirs)
    first = next((pair for pair in pairs if pair[1] != pair[2]), ("?", mine, theirs))
    return [f"{name} differ, first at {first[0]}: {str(first[1])[:200]} and not {str(first[2])[:200]}"]


def _pairs(mine: Any, theirs: Any) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(mine, dict):
        keys = sorted(mine.keys() | theirs.keys(), key=str)
        yield from ((key, mine.get(key), theirs.get(key)) for key in keys)
    else:
        longest = max(len(mine), len(theirs))
        mine, theirs = ([*each, *[None] * (longest - len(each))] for each in (mine, theirs))
        yield from zip(range(longest), mine, theirs, strict=True)


def events(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """The points and pictures of each tag, read by a reader that knows nothing of restarts."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for file in sorted((run_dir / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.tag.startswith(TIMINGS) and not value.HasField("tensor"):
                    point = value.image.encoded_image_string or value.simple_value
                    found.setdefault(value.tag, []).append((event.step, point))
    return found


def _not_once(run_dir: Path, dataset: Path) -> list[str]:
    """Epochs that did not see every tile exactly once; only their last may end early."""
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    everything = Counter(reader.key(tile) for tile in range(len(reader)))
    seen: dict[int, Counter[str]] = {}
    for (epoch, _), keys in samples(run_dir).items():
        seen.setdefault(epoch, Counter()).update(keys)
    return [f"epoch {epoch} did not see every tile once" for epoch in seen if seen[epoch] != everything]


def _damaged_checkpoints(run_dir: Path, damaged: Collection[str]) -> list[str]:
    """Checkpoints that are not whole, set aside without a reason, or passed over without a word."""
    folder = run_dir / "checkpoints"
    wrong = []
    for path in checkpoint.folders(folder):
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            wrong.append(str(error))
    aside = {path.name.removeprefix(_ASIDE) for path in folder.glob(f"{_ASIDE}*")}
    wrong += [f"{name} was set aside, but nobody damaged it" for name in sorted(aside - {*damaged})]
    log = (run_dir / "log" / "rank-0.log").read_text().splitlines()
    warnings = [line for line in log if " WARNING " in line]
    for name in damaged:
        if not any(name in line for line in warnings):
            wrong.append(f"the log does not say that {name} was damaged")
    return wrong


def _fat(run_dir: Path, reference: Path) -> list[str]:
    """Whether a run directory holds more than a checkpoint too many, and what attempts say."""
    aside = sum(map(bytes_below, (run_dir / "checkpoints").glob(f"{_ASIDE}*")))
    mine, theirs = bytes_below(run_dir) - aside, bytes_below(reference)
    one = max(map(bytes_below, checkpoint.folders(reference / "checkpoints")))
    if mine <= theirs + 1.5 * one + _WORDS_BYTES:
        return []
    return [f"the run directory has {mine} bytes instead of {theirs}"]


def leftovers(run_dir: Path) -> list[str]:
    """Files that are half written or half removed."""
    names = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*")]
    return [f"{name} is left over" for name in sorted(names) if _HALF.search(name)]


def growth(name: str, values: Sequence[float], *, slack: float = 0.0) -> list[str]:
    """Whether the last third of some measurements is larger than the first.

    Args:
        name: of what was measured.
        values: in their order; fewer than six say nothing.
        slack: that the medians may differ by.
    """
    if len(values) < 6:
        return []
    third = len(values) // 3
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    if last <= first + slack:
        return []
    return [f"{name} grew from {first:.0f} to {last:.0f} over {len(values)} measurements"]


def growth_within(name: str, gauges: Sequence[dict[str, Any]]) -> list[str]:
    """What grew over the second half of a long attempt of one rank."""
    settled = gauges[len(gauges) // 2 :]  # all files of both splits are open by then
    return [
        *_gauged(name, settled, slack=1),
        *([f"{name}: something is in /dev/shm"] if any(row["shared"] for row in gauges) else []),
    ]


def growth_over(name: str, gauges: Iterable[dict[str, Any]]) -> list[str]:
    """What grew from attempt to attempt, looked at after equally many steps.

    By then one attempt has read a few more shards than another.
    """
    return _gauged(name, list(gauges), slack=_SHARDS)


def _gauged(name: str, gauges: Sequence[dict[str, Any]], *, slack: float) -> list[str]:
    return [
        *growth(f"{name}: memory (KiB)", [row["kib"] for row in gauges], slack=_SLACK_KIB),
        *growth(f"{name}: open files", [row["files"] for row in gauges], slack=slack),
        *growth(f"{name}: threads", [row["threads"] for row in gauges], slack=slack),
    ]


def bytes_below(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def tracebacks(text: str) -> list[str]:
    """The errors that tracebacks end with: each is a bug."""
    parts = text.split("Traceback (most recent call last)")[1:]
    found = [_LAST_LINE.search(part) for part in parts]
    return [f"a traceback: {line[1] if line else 'cut off'}" for line in found]
