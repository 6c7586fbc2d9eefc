"""The pages of the site, and the blocks of code on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
ELSEWHERE: dict[str, str] = SITE["extra"]["elsewhere"]

# A comment before a block says what is special about it: it is not run, and why; it runs while the jobs
# of the blocks before it do; it serves pages until it is stopped; it ends with 1 if it finds something.
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run: [^>]+|meanwhile|serves|may find something) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code on a page.

    Attributes:
        page: file of the page, relative to the repository.
        line: where it begins.
        language: that it says it is in; empty where it says nothing.
        text: what stands in it.
        mark: `not run`, `meanwhile`, `serves`, `may find something` or nothing.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """Its commands, those that go over several lines in one."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def sources() -> list[str]:
    """The files that the pages are made of, relative to the repository."""
    own = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    return own + list(ELSEWHERE.values())


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in their order."""
    text = (ROOT / page).read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            text=found["text"],
            mark=(found["mark"] or "").partition(":")[0],
        )
        for found in _FENCE.finditer(text)
    ]


def every_block() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in sources() for block in blocks(page)]
