"""What a page that we wrote is made of."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "source"}


class Parsed(HTMLParser):
    """A page's elements and texts, with every element closed that was opened.

    Attributes:
        elements: each with its attributes.
        texts: those that are seen.
        marked: of them those that are marked.
        style: the style sheet.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.marked: list[str] = []
        self.style = ""
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        elif data.strip():
            self.texts.append(data.strip())
            if self.open[-1:] == ["mark"]:
                self.marked.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, name: str, cells: int) -> list[str]:
        """The texts that follow the first one of this name."""
        start = self.texts.index(name) + 1
        return self.texts[start : start + cells]
