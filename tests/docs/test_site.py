"""The site: it is built without a warning, is whole, and a browser that shows it asks nobody else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import agrivision
from agrivision.config import Config, flatten
from tests.docs.pages import ELSEWHERE, ROOT, SITE

# What a browser loads by itself; a link that somebody has to follow is none of it.
LOADED = {"src", "srcset", "poster", "data", "background", "action", "formaction"}
LOADING = {
    "stylesheet",
    "icon",
    "preload",
    "preconnect",
    "dns-prefetch",
    "prefetch",
    "modulepreload",
    "manifest",
}
ELSEWHERE_IN_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^)'\"]+)")


class Reader(HTMLParser):
    """What a page is made of, as far as the tests ask for it.

    Attributes:
        loads: addresses that a browser asks for when it shows the page.
        ids: of its elements.
        policy: its content security policy.
        items: the texts of its lists' items.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.policy = ""
        self.items: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.loads += [value for name, value in given.items() if name in LOADED]
        if tag == "link" and LOADING & set(given.get("rel", "").split()):
            self.loads.append(given["href"])
        if tag in ("use", "image") and "href" in given:
            self.loads.append(given["href"])
        if given.get("http-equiv", "").lower() == "content-security-policy":
            self.policy = given["content"]
        assert given.get("http-equiv", "").lower() != "refresh"
        self.loads += ELSEWHERE_IN_CSS.findall(given.get("style", ""))
        self.ids.add(given.get("id", ""))
        if tag == "li":
            self.items.append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "li":
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.items[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs does that")
    folder = tmp_path_factory.mktemp("built") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def pages(site: Path) -> Iterator[tuple[str, Reader]]:
    found = sorted(site.rglob("*.html"))
    assert len(found) > 20
    for path in found:
        yield path.name, Reader(path.read_text())


def test_it_asks_nobody_else(site: Path) -> None:
    for name, page in pages(site):
        assert page.loads, name
        assert [load for load in page.loads if re.match(r"(https?:)?//", load)] == [], name
        rules = dict(rule.split(maxsplit=1) for rule in page.policy.split("; "))
        assert rules["default-src"] == "'self'", name
        assert "http" not in page.policy and "*" not in page.policy, name
    for path in site.rglob("*.css"):
        assert ELSEWHERE_IN_CSS.findall(path.read_text()) == [], path


def test_a_page_that_asks_somebody_else_is_noticed() -> None:
    text = (
        '<link rel="stylesheet" href="https://a/b.css"><img src="//c/d.png"><a href="https://e">e</a>'
    )
    assert Reader(text).loads == ["https://a/b.css", "//c/d.png"]
    assert ELSEWHERE_IN_CSS.findall('@import "https://a/b.css"; x{src:url(//c/d.woff)}') == [
        "https://a/b.css",
        "//c/d.woff",
    ]


def test_every_page_is_in_the_menu(site: Path) -> None:
    named = set(re.findall(r"[a-z_]+\.md", yaml.safe_dump(SITE["nav"])))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | set(ELSEWHERE)
    assert {f"{name.removesuffix('.md')}.html" for name in named} <= {name for name, _ in pages(site)}


def test_every_key_is_there_with_its_default(site: Path) -> None:
    item = re.compile(r"([a-z_0-9.]+) \((.+); default (.+?)\): (.+)", re.DOTALL)
    items = Reader((site / "configuration.html").read_text()).items
    found = {match[1]: match for text in items if (match := item.fullmatch(text))}
    keys = flatten(Config().to_dict())
    assert found.keys() == keys.keys()
    for key, value in keys.items():
        assert yaml.safe_load(found[key][3].replace("nothing", "''")) == value, key
    assert found["data.decoder"][2] == "cpu or gpu"
    assert found["data.crop"][2] == "whole number or null"
    assert (
        found["augment.rotate"][4]
        == "samples are turned by an angle drawn between -rotate and rotate degrees."
    )


def test_every_name_of_the_library_is_there(site: Path) -> None:
    ids = Reader((site / "api.html").read_text()).ids
    assert {f"agrivision.{name}" for name in agrivision.__all__ if name != "__version__"} <= ids


def test_files_stand_where_they_are_asked_for(site: Path) -> None:
    """Of each configuration, and of the batch script, the first comment is on its page."""
    for page, name in [("configuration", "configs/naip.yaml"), ("slurm", "slurm/train.sbatch")]:
        comment = next(line for line in (ROOT / name).read_text().splitlines() if line.startswith("# "))
        assert comment in (site / f"{page}.html").read_text()
