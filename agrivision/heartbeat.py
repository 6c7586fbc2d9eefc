"""What ranks say of themselves every few seconds, and who keeps the others waiting: pure functions.

A rank that waits for the others is seldom the one that hangs. Guilty is who is at something else and
does not get on, who is not heard of any more, or who is behind: all ranks meet equally often, and the
one that has met the others least often is waited for. Where all are at the same meeting, none is: then
it is what carries their messages.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agrivision.ending import STALLED

MISSED = 3  # heartbeats that a rank may miss where the machine is busy
_SLOW = 1.5  # a straggler takes so many times as long as most
_COST = 0.1  # and it costs the others this share of their time
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        rank: which.
        node: where, as the launcher names it.
        host: where, as the machine names itself.
        pid: of its process.
        born: when that began, in the kernel's ticks; no other process of the host has both.
        number: counts the rank's heartbeats.
        phase: what its main thread is at.
        waits: whether that may be waiting for others.
        quiet: seconds in which it has not got on.
        meetings: how often it has begun to wait for the other ranks.
        spent: seconds by phase so far, those of a step only.
    """

    rank: int
    node: str
    host: str
    pid: int
    born: int
    number: int
    phase: str
    waits: bool
    quiet: float
    meetings: int
    spent: Mapping[str, float]

    def encode(self) -> str:
        """For `decode`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Beat:
        """What `encode` wrote."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """As a message names the rank: `rank 3 on n2`."""
        return f"rank {self.rank} on {self.node}"


@dataclass(frozen=True)
class Heard:
    """The last that was heard of a rank.

    Attributes:
        beat: what it said.
        age: seconds since, by the clock of who heard it.
    """

    beat: Beat
    age: float

    @property
    def quiet(self) -> float:
        """Seconds in which it has not got on, as far as anybody knows."""
        return self.beat.quiet + self.age


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a run stands still.

    Attributes:
        culprits: the last heartbeats of those that the others wait for; none where all wait for one
            another.
        line: for people.
    """

    culprits: tuple[Beat, ...]
    line: str

    def encode(self) -> str:
        """For `decode`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Verdict:
        """What `encode` wrote."""
        content = json.loads(text)
        return cls(culprits=tuple(Beat(**row) for row in content["culprits"]), line=content["line"])


def judge(ranks: Sequence[Heard], limit: float, period: float) -> Verdict | None:
    """Who keeps the run waiting for longer than it may be; None while it gets on.

    Args:
        ranks: the last that was heard of each.
        limit: seconds that a rank may be quiet.
        period: seconds between two heartbeats.
    """
    lost = [each for each in ranks if each.age >= limit]
    hang = [each for each in ranks if not each.beat.waits and each.quiet >= limit]
    culprits = [each for each in ranks if each in lost or each in hang]
    if not culprits:
        if any(each.quiet < limit for each in ranks):
            return None
        culprits = _behind(ranks, period)
    line = _named(culprits, period) if culprits else _nobody(ranks)
    return Verdict(culprits=tuple(each.beat for each in culprits[:_SHOWN]), line=STALLED + line)


def _behind(ranks: Sequence[Heard], period: float) -> list[Heard]:
    """Of ranks that all seem to wait: those that the others wait for."""
    silent = [each for each in ranks if each.age >= MISSED * period]
    if silent:
        return silent
    least = min(each.beat.meetings for each in ranks)
    behind = [each for each in ranks if each.beat.meetings == least]
    return behind if len(behind) < len(ranks) or len(ranks) == 1 else []


def _named(culprits: Sequence[Heard], period: float) -> str:
    more = f"; and {len(culprits) - _SHOWN} more ranks" if len(culprits) > _SHOWN else ""
    return "; ".join(_told(each, period) for each in culprits[:_SHOWN]) + more


def _told(rank: Heard, period: float) -> str:
    beat = rank.beat
    name = f"{beat.name} (process {beat.pid})" if beat.pid else beat.name
    if rank.age >= MISSED * period:
        return f"{name} has not been heard of for {rank.age:.0f} s, last in '{beat.phase}'"
    return f"{name} has been in '{beat.phase}' for {rank.quiet:.0f} s without getting on"


def _nobody(ranks: Sequence[Heard]) -> str:
    phases = ", ".join(sorted({f"'{each.beat.phase}'" for each in ranks}))
    return (
        f"a collective does not end: all {len(ranks)} ranks have been in the same one for"
        f" {min(each.quiet for each in ranks):.0f} s, in {phases}"
    )


def table(ranks: Iterable[Heard]) -> str:
    """What each rank is at, those at the same in one line."""
    groups: defaultdict[tuple[str, int], list[Heard]] = defaultdict(list)
    for each in ranks:
        groups[each.beat.phase, each.beat.meetings].append(each)
    lines = []
    for (phase, meetings), group in groups.items():
        names = ", ".join(each.beat.name for each in group[:_SHOWN])
        more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        quiet = max(each.quiet for each in group)
        lines.append(f"'{phase}' for up to {quiet:.0f} s, {meetings} meetings: {names}{more}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that gets on, but slower than the others.

    Attributes:
        rank: which.
        line: for people.
    """

    rank: int
    line: str


def find_straggler(before: Sequence[Beat], after: Sequence[Beat], seconds: float) -> Straggler | None:
    """The rank whose own work takes far longer than that of most; the others wait for it each step.

    Time in which a rank may wait for others is not among what is `spent`.

    Args:
        before: of each rank, at the beginning of a stretch of time.
        after: of each rank, at its end.
        seconds: between.
    """
    if len(after) < 2:
        return None
    own = [sum(b.spent.values()) - sum(a.spent.values()) for a, b in zip(before, after, strict=True)]
    usual = statistics.median_low(own)
    place = max(range(len(own)), key=own.__getitem__)
    beat = after[place]
    if beat.meetings == before[place].meetings:  # it does not get on at all
        return None
    if own[place] <= _SLOW * usual or own[place] - usual <= _COST * seconds:
        return None
    longer = {phase: spent - before[place].spent.get(phase, 0.0) for phase, spent in beat.spent.items()}
    phase = max(longer, key=longer.__getitem__)
    line = (
        f"{beat.name} is slower than the others: of the last {seconds:.0f} s its own work took"
        f" {own[place]:.0f} s, theirs {usual:.0f} s; most of it in '{phase}'"
    )
    return Straggler(rank=beat.rank, line=line)
