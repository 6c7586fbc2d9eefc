"""A page in headless Chromium: what it fetches, what it complains of, how wide it is, how legible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

PHONE, DESK = (390, 844), (1280, 900)
_NEAR = {"", "localhost", "127.0.0.1"}  # hosts; data: and file: have none


@dataclass
class Look:
    """A page that is open.

    Attributes:
        page: of Playwright.
        complaints: errors and warnings of its console, and scripts that failed.
        strangers: addresses beyond this machine that it asked for.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def open(self, address: str, width_height: tuple[int, int] = DESK) -> None:
        """Go to a page, in a window of some size."""
        self.page.set_viewport_size({"width": width_height[0], "height": width_height[1]})
        self.page.goto(address, wait_until="load")

    def spill(self) -> int:
        """By how many pixels the page is wider than its window."""
        width: int = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return width

    def broken(self) -> list[str]:
        """Pictures that were not drawn."""
        found: list[str] = self.page.evaluate(
            "Promise.all(Array.from(document.images, image => image.decode()"
            ".then(() => '', () => image.alt || image.src.slice(-80))))"
        )
        return [alt for alt in found if alt]

    def violations(self) -> list[str]:
        """What axe-core finds against WCAG 2 A and AA, contrast among it."""
        self.page.evaluate(axe())
        found = self.page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']})")
        return [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
            for one in found["violations"]
        ]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save what is seen where AGRIVISION_SCREENSHOTS names a folder, for people to look at."""
        folder = os.environ.get("AGRIVISION_SCREENSHOTS")
        if folder:
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(target), full_page=whole)


@cache
def axe() -> str:
    """The source of axe-core."""
    module = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    return (Path(str(module.__file__)).parent / "axe.min.js").read_text("utf-8")


@contextmanager
def looking(browser: Any, *, dark: bool = False) -> Iterator[Look]:
    """A page of a browser that has nothing of earlier ones."""
    context = browser.new_context(color_scheme="dark" if dark else "light", device_scale_factor=1)
    try:
        page = context.new_page()
        look = Look(page)
        page.on("console", lambda message: _note(look, message))
        page.on("pageerror", lambda error: look.complaints.append(str(error)))
        page.on("request", lambda request: _see(look, request.url))
        yield look
    finally:
        context.close()


def _note(look: Look, message: Any) -> None:
    if message.type in ("error", "warning"):
        look.complaints.append(f"{message.type}: {message.text}")


def _see(look: Look, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("data", "blob", "file") and (parts.hostname or "") not in _NEAR:
        look.strangers.append(url)
