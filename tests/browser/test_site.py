"""The documentation as a site, in a real browser."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.looking import DESK, PHONE, looking

pytestmark = pytest.mark.faults  # a minute
ROOT = Path(__file__).parents[2]
PAGES = ["index", "start", "agriculture_vision", "slurm", "configuration", "api", "comparison"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site, built and served to this machine alone."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "--site-dir",
        str(folder),
    ]
    own = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=own, timeout=300)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_page_of_the_site_is_fit_to_be_read(
    name: str, dark: bool, size: tuple[int, int], address: str, browser: Any
) -> None:
    with looking(browser, dark=dark) as look:
        look.open(f"{address}{name}.html", size)
        assert (look.broken(), look.spill()) == ([], 0)
        look.picture(Path(f"site-{name}-{size[0]}{'-dark' if dark else ''}.png"))
        assert look.violations() == []
        assert (look.complaints, look.strangers) == ([], [])


def test_the_search_finds_a_key(address: str, browser: Any) -> None:
    with looking(browser) as look:
        look.open(f"{address}index.html")
        query = look.page.locator("[data-md-component=search-query]")
        query.click()
        query.press_sequentially("checkpoint")
        look.page.locator(".md-search-result__link").first.wait_for(timeout=30_000)
        assert look.page.locator(".md-search-result__link").count() > 0
        assert (look.complaints, look.strangers) == ([], [])
