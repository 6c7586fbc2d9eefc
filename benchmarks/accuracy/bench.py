"""Which runs there are, and those that are missing, run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any

from agrivision.config import flatten
from agrivision.errors import ConfigurationError
from benchmarks.accuracy import ours
from benchmarks.accuracy.contestants import OURS, PEERS
from benchmarks.accuracy.ingredients import INGREDIENTS
from benchmarks.accuracy.outcome import Outcome
from benchmarks.accuracy.results import Results, Row, key
from benchmarks.accuracy.task import Task
from benchmarks.common import fresh, machine, missing, say

PARTS = ("peers", "on", "off")
PLAIN_RECIPE, RECOMMENDED = "plain", "recommended"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of one contestant.

    Attributes:
        contestant: its name.
        seed: of the run.
        recipe: of ours, else empty.
        change: what is switched on (`+ NAME`) or off (`- NAME`) in it; empty for the recipe as it is.
        settings: of ours that differ from the defaults.
        base: those of the recipe without the change.
    """

    contestant: str
    seed: int = 0
    recipe: str = ""
    change: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    def row(self, task: Task) -> Row:
        """What a line of the results says of it before it has run."""
        content = asdict(self)
        content |= {"task": task.name, "data": task.schema.fingerprint, "budget": task.budget.to_dict()}
        result: Row = json.loads(json.dumps(content))  # as it is read: lists, no tuples
        return result


def plan(task: Task, parts: Sequence[str], seeds: Iterable[int], only: Sequence[str] = ()) -> list[Job]:
    """All runs, seed after seed, so that a bench that is interrupted has whole rounds.

    Args:
        task: what to learn.
        parts: of PARTS.
        seeds: one run each.
        only: names of peers and ingredients; none for all. Both recipes as they are always belong.

    Raises:
        ConfigurationError: a name is neither a peer's nor an ingredient's, or a recipe or an ingredient
            has a key or a value that is wrong.
    """
    unknown = [name for name in only if name not in PEERS and name not in INGREDIENTS]
    if unknown:
        known = ", ".join([*PEERS, *INGREDIENTS])
        raise ConfigurationError(f"there is no {unknown[0]!r} to take part: there are {known}")
    one = list(_recipes(task, parts, only))
    if "peers" in parts:
        one += [Job(contestant=name) for name in PEERS if not only or name in only]
    return [replace(job, seed=seed) for seed in seeds for job in one]


def _recipes(task: Task, parts: Sequence[str], only: Sequence[str]) -> Iterator[Job]:
    files = {PLAIN_RECIPE: task.plain, RECOMMENDED: task.recommended}
    configs = {name: ours.resolved(task, file) for name, file in files.items()}
    values = {name: flatten(config.to_dict()) for name, config in configs.items()}
    bases = {name: ours.settings(config) for name, config in configs.items()}

    def job(recipe: str, change: str, changes: Mapping[str, Any]) -> Job:
        settings = ours.settings(ours.changed(configs[recipe], changes))
        return Job(contestant=OURS, recipe=recipe, change=change, settings=settings, base=bases[recipe])

    yield job(RECOMMENDED, "", {})
    if "on" in parts:
        yield job(PLAIN_RECIPE, "", {})
    for name, on in INGREDIENTS.items():
        if only and name not in only:
            continue
        if "on" in parts:
            yield job(PLAIN_RECIPE, f"+ {name}", on)
        if "off" in parts:
            if is_in(on, values[RECOMMENDED], values[PLAIN_RECIPE]):
                yield job(RECOMMENDED, f"- {name}", {each: values[PLAIN_RECIPE][each] for each in on})
            else:
                yield job(RECOMMENDED, f"+ {name}", on)


def is_in(on: Mapping[str, Any], recipe: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether a recipe has an ingredient.

    Args:
        on: what switches it on.
        recipe: all of its values by key.
        plain: likewise, of the plain recipe.
    """
    return any(plain[key] != value for key, value in on.items()) and all(
        recipe[key] == value for key, value in on.items()
    )


def run(task: Task, jobs: Sequence[Job], results: Results, *, together: int) -> int:
    """Run what is not among the results; what has been run under another name is taken over.

    Args:
        task: what to learn.
        jobs: in the order in which they begin.
        results: where each run's line goes when it ends.
        together: runs at the same time, each a process.

    Returns:
        How many runs failed.
    """
    found = {key(row): row for row in results.rows()}
    last = {_label(row): _name(row) for row in results.rows()}
    waiting: dict[str, list[Row]] = {}
    for job in jobs:
        peer, row = PEERS.get(job.contestant), job.row(task)
        if peer is not None and (lacking := missing(*peer.needs)):
            say(f"{peer.title}: left out, not installed: {', '.join(lacking)}")
        elif last.get(_label(row)) != _name(row):
            waiting.setdefault(key(row), []).append(row)
    say(f"{len(waiting)} runs")
    lock = Lock()

    def one(rows: Sequence[Row]) -> bool:
        title = f"{_title(rows[0])}, seed {rows[0]['seed']}"
        before = found.get(key(rows[0]))
        try:
            result = _result(task, rows[0]) if before is None else before
        except Exception as error:  # the others go on
            say(f"failed: {title}: {error}")
            return False
        with lock:
            for row in rows:
                results.add(row | {name: result[name] for name in _FOUND})
        say(f"mIoU {result['miou']:.3f} in {result['seconds']:.0f} s: {title}")
        return True

    with ThreadPoolExecutor(together) as pool:
        futures = [pool.submit(one, rows) for rows in waiting.values()]
        try:
            return sum(not future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_FOUND = ("miou", "iou", "steps", "seconds", "parameters", "gflops", "symmetric", "machine")
_LABEL = ("task", "data", "budget", "contestant", "recipe", "change", "seed")


def _label(row: Row) -> str:
    """The place of a line in the tables: of those with the same one the last counts."""
    return json.dumps([row[name] for name in _LABEL])


def _name(row: Row) -> str:
    """The same, and what was run: a recipe may have changed since."""
    return json.dumps([_label(row), row["settings"], row["base"]], sort_keys=True)


def _title(row: Row) -> str:
    return " ".join(word for word in (row["contestant"], row["recipe"], row["change"]) if word)


def _result(task: Task, row: Row) -> Row:
    return asdict(fresh(_outcome, task, row)) | {"machine": machine()}


def _outcome(task: Task, row: Row) -> Outcome:
    """Train and score; in a process of its own."""
    if row["contestant"] == OURS:
        symmetric = not row["change"]
        return ours.agrivision(task, row["seed"], row["settings"], symmetric=symmetric)
    return PEERS[row["contestant"]].train(task, row["seed"])
