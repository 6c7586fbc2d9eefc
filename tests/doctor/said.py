"""What findings say, for tests that look for one among them."""

from __future__ import annotations

from collections.abc import Iterable

from agrivision.doctor.finding import Finding, Verdict


def about(findings: Iterable[Finding], words: str) -> Finding:
    """The only finding in which these words stand."""
    every = list(findings)
    found = [each for each in every if words in each.what]
    assert len(found) == 1, "\n".join(f"{each.verdict}: {each.what}" for each in every)
    return found[0]


def worse(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """What is not good, as (verdict, what)."""
    return [(str(each.verdict), each.what) for each in findings if each.verdict != Verdict.GOOD]
