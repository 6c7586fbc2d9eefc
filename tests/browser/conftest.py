"""One Chromium for all pages, and a run to look at."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Disturbance, run
from tests.training.runs import arguments


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, the distribution's own."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    switches = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=switches)
        yield found
        found.close()


@pytest.fixture(scope="session")
def interrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three interruptions, of three kinds."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    command = arguments(dataset, folder, monitor__images=2, monitor__log_every_steps=1)
    for number, code in ((signal.SIGTERM, 85), (signal.SIGKILL, -9), (signal.SIGUSR1, 85)):
        assert run(command, disturbance=Disturbance(number, "forward", count=6)) == [code]
    assert run(command) == [0]
    return folder
