"""What a check says: one line, whether it is well, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How well something is; what is merely not there is good."""

    GOOD = "good"
    CAREFUL = "careful"  # it works, but slower, or not always
    BAD = "bad"  # something that a run needs does not work


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of an examination.

    Attributes:
        topic: what it is about, for example `Python`.
        what: was found, with its figures.
        verdict: how well that is.
        advice: what to do about it; empty where it is good.
    """

    topic: str
    what: str
    verdict: Verdict
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.verdict == Verdict.GOOD) == bool(self.advice):
            raise ValueError(f"what is not good needs an advice, and only that: {self.what}")


@dataclass(frozen=True)
class Topic:
    """Makes the findings about one thing.

    Attributes:
        name: of the topic.
    """

    name: str

    def good(self, what: str) -> Finding:
        """It is well, or a plain fact."""
        return Finding(topic=self.name, what=what, verdict=Verdict.GOOD)

    def careful(self, what: str, advice: str) -> Finding:
        """It works, but."""
        return Finding(topic=self.name, what=what, verdict=Verdict.CAREFUL, advice=advice)

    def bad(self, what: str, advice: str) -> Finding:
        """It does not work."""
        return Finding(topic=self.name, what=what, verdict=Verdict.BAD, advice=advice)

    def graded(self, value: float, good: float, careful: float, what: str, advice: str) -> Finding:
        """By a value of which more is better.

        Args:
            value: that was found.
            good: so much is enough.
            careful: less than this does not work.
            what: was found, in words.
            advice: where it is not good.
        """
        if value >= good:
            return self.good(what)
        return self.careful(what, advice) if value >= careful else self.bad(what, advice)


def counted(findings: Iterable[Finding]) -> dict[Verdict, int]:
    """How many findings there are of each verdict."""
    counts = dict.fromkeys(Verdict, 0)
    for finding in findings:
        counts[finding.verdict] += 1
    return counts
