"""Which faults strike a run, where and when: a pure function of a seed.

A storm is dealt like cards: every kind of fault once, in any order, before one comes again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "one rank killed",
    "all ranks killed",
    "stopped",
    "stopped twice",
    "paused",
    "killed while saving",
    "stopped while saving",
    "killed while validating",
    "stopped while validating",
    "checkpoint damaged",
    "attempt.json damaged",
    "half a row",
    "killed while starting",
    "stopped while starting",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Ranks that are forked from a process which has imported torch have no such moments.
FORKED: tuple[Kind, ...] = KINDS[:-2]

Moment = Literal[
    "starting", "importing", "meeting", "claiming", "loading", "forgetting",
    "forward", "backward done", "adding up", "optimiser", "average", "step done",
    "copying", "saving", "writing", "syncing", "renaming", "renamed", "tidying", "removing",
    "evaluating", "scored", "drawing",
]  # fmt: skip
# Before the handlers of signals are there; a signal then ends the process, as it ends any.
UNHEARD: tuple[Moment, ...] = ("starting",)
START: tuple[Moment, ...] = (*UNHEARD, "importing", "meeting", "claiming", "loading", "forgetting")
STEP: tuple[Moment, ...] = (
    "forward", "backward done", "adding up", "optimiser", "average", "step done",
)  # fmt: skip
SAVE: tuple[Moment, ...] = (
    "copying", "saving", "writing", "syncing", "renaming", "renamed", "tidying", "removing",
)  # fmt: skip
VALIDATION: tuple[Moment, ...] = ("evaluating", "scored", "drawing")
ON_MAIN: tuple[Moment, ...] = ("claiming", "loading", "forgetting", *SAVE, "scored", "drawing")

Damage = Literal["flipped bit", "truncated", "no manifest", "flipped byte", "half row"]
CHECKPOINT_DAMAGE: tuple[Damage, ...] = ("flipped bit", "truncated", "no manifest")

Signal = Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT", "SIGSTOP"]
STOPS: tuple[Signal, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")

MOST_RANKS, MOST_THREADS = 4, 3
_LAST = 0.85  # no fault is due after this share of the run: each must find its moment
_MOST_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to an attempt.

    Attributes:
        kind: of the fault.
        moment: it strikes there.
        step: at the first such moment at which so many steps are done; start-up knows no steps.
        rank: that meets the moment.
        everybody: all ranks get the signals, not only this one.
        signals: in their order.
        damage: done to the files after the attempt, None for none.
        ranks: of the attempt that this is the first fault of.
        threads: that decode, of each of its ranks.
    """

    kind: Kind
    moment: Moment
    step: int
    rank: int
    everybody: bool
    signals: tuple[Signal, ...]
    damage: Damage | None
    ranks: int
    threads: int

    @property
    def ends(self) -> bool:
        """Whether the attempt does not outlive it."""
        return self.signals != ("SIGSTOP",)

    def __str__(self) -> str:
        who = "all ranks" if self.everybody else f"rank {self.rank}"
        after = f", then {self.damage}" if self.damage else ""
        signals = " and ".join(self.signals)
        return f"{self.kind}: {signals} to {who} of {self.ranks} at {self.moment}{after}"


def storm(
    seed: int,
    count: int = 20,
    *,
    steps: int = 200,
    save_every: int = 6,
    evaluate_every: int = 20,
    kinds: Sequence[Kind] = KINDS,
    most_ranks: int = MOST_RANKS,
) -> list[Fault]:
    """The faults of a storm, in their order.

    Args:
        seed: the same one gives the same storm, everywhere.
        count: of faults.
        steps: of the whole run.
        save_every: steps from one checkpoint to the next.
        evaluate_every: steps from one validation to the next.
        kinds: that may come.
        most_ranks: of an attempt.

    Raises:
        ValueError: the run is too short for so many faults.
    """
    chance = random.Random(seed)
    for _ in range(_MOST_DRAWS):
        deal: list[Kind] = []
        while len(deal) < count:
            deal += chance.sample(kinds, len(kinds))
        due = sorted(chance.randint(1, int(_LAST * steps)) for _ in range(count))
        if not _can_happen(deal[:count], due, save_every):
            continue
        faults = _faults(chance, deal, due, save_every, most_ranks)
        if _last_place(faults, save_every, evaluate_every) < steps:
            return faults
    raise ValueError(f"{count} faults do not fit into a run of {steps} steps")


def _faults(
    chance: random.Random, deal: Sequence[Kind], due: Sequence[int], save_every: int, most_ranks: int
) -> list[Fault]:
    faults: list[Fault] = []
    for kind, step, before in zip(deal, due, [0, *due], strict=False):
        first = not faults or faults[-1].ends
        size = _size(chance, kind, most_ranks) if first else faults[-1].ranks
        threads = chance.randint(0, MOST_THREADS) if first else faults[-1].threads
        faults.append(_fault(chance, kind, step, size, threads, resumed=before > 4 * save_every))
    return faults


def _last_place(faults: Sequence[Fault], save_every: int, evaluate_every: int) -> int:
    """The latest step at which the last of the faults may happen: moments do not come at every step."""
    place = 0
    for fault in faults:
        if fault.moment not in START:
            every = 1
            if fault.moment in VALIDATION:
                every = evaluate_every
            elif fault.moment in SAVE:
                # Nothing is removed before there is more than is kept, as after damage.
                every = save_every * (3 if fault.moment == "removing" else 1)
            place = -(-max(fault.step, place + 1) // every) * every
    return place


def attempts(faults: Sequence[Fault]) -> list[list[Fault]]:
    """The faults by the attempts that they happen to: the last of each ends it."""
    groups: list[list[Fault]] = [[]]
    for fault in faults:
        groups[-1].append(fault)
        if fault.ends:
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def _can_happen(deal: Sequence[Kind], due: Sequence[int], save_every: int) -> bool:
    """Whether each damaged checkpoint leaves whole ones, and no start follows a mere pause."""
    earliest = 4 * save_every
    before: Kind | None = None
    for kind, step in zip(deal, due, strict=True):
        if before == "paused" and kind.endswith("starting"):
            return False
        if kind == "checkpoint damaged":
            if step < earliest:
                return False
            earliest = step + 2 * save_every
        before = kind
    return True


def _size(chance: random.Random, kind: Kind, most: int) -> int:
    """Most faults happen to any number of ranks, but to lose one, or wait for one, takes two."""
    return chance.randint(2 if kind in ("one rank killed", "paused") else 1, most)


def _fault(
    chance: random.Random, kind: Kind, step: int, ranks: int, threads: int, *, resumed: bool
) -> Fault:
    moments = [
        moment
        for moment in _MOMENTS.get(kind, STEP)
        if (moment != "loading" or resumed) and (moment != "meeting" or ranks > 1)
    ]
    moment = chance.choice(moments)
    return Fault(
        kind=kind,
        moment=moment,
        step=step,
        rank=0 if moment in ON_MAIN else chance.randrange(ranks),
        everybody=_EVERYBODY.get(kind, chance.random() < 0.5),
        signals=_signals(chance, kind, moment),
        damage=chance.choice(_DAMAGE[kind]) if kind in _DAMAGE else None,
        ranks=ranks,
        threads=threads,
    )


def _signals(chance: random.Random, kind: Kind, moment: Moment) -> tuple[Signal, ...]:
    if kind == "paused":
        return ("SIGSTOP",)
    if kind == "stopped twice":
        return (chance.choice(STOPS), chance.choice(STOPS))
    if kind.startswith("stopped"):
        # Python itself complains of a Ctrl-C in a program that has not begun.
        return (chance.choice(STOPS[:2] if moment in UNHEARD else STOPS),)
    return ("SIGKILL",)


_MOMENTS: dict[Kind, tuple[Moment, ...]] = {
    "paused": (*STEP, *SAVE, *VALIDATION),
    "killed while saving": SAVE,
    "stopped while saving": SAVE,
    "killed while validating": VALIDATION,
    "stopped while validating": VALIDATION,
    "killed while starting": START,
    "stopped while starting": START,
}
_EVERYBODY: dict[Kind, bool] = {"one rank killed": False, "all ranks killed": True}
_DAMAGE: dict[Kind, tuple[Damage, ...]] = {
    "checkpoint damaged": CHECKPOINT_DAMAGE,
    "attempt.json damaged": ("flipped byte",),
    "half a row": ("half row",),
}
