"""TensorBoard of a run with three interruptions, in a real browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.looking import looking

pytestmark = pytest.mark.faults  # minutes
_SECONDS = 120


@pytest.fixture(scope="module")
def address(interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `agrivision tensorboard` says that it is."""
    log = tmp_path_factory.mktemp("log") / "board.log"
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SSH"))}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "agrivision", "tensorboard", str(interrupted.parent)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=own)
    try:
        end = time.monotonic() + _SECONDS
        while (found := re.search(r"http://localhost:\S+", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


TABS = {
    "timeseries": "loss",
    "scalars": "loss",
    "custom_scalars": "IoU",
    "images": "tiles",
    "hparams": "optimizer.lr",
    "pr_curves": "pr/background",
    "text": "seed|torch",
}


@pytest.mark.parametrize("tab", TABS)
def test_a_tab_shows_what_it_should(tab: str, address: str, browser: Any) -> None:
    with looking(browser) as look:
        look.page.set_viewport_size({"width": 1400, "height": 1000})
        look.page.goto(f"{address}#{tab}", wait_until="load")
        frames = "tf-tensorboard, tb-root, app-root, body"
        look.page.wait_for_selector(frames, state="attached")
        pattern = re.compile(TABS[tab])
        look.page.get_by_text(pattern).locator("visible=true").first.wait_for(timeout=60_000)
        look.page.wait_for_load_state("networkidle")
        look.page.wait_for_timeout(1500)  # for the picture alone: charts fade in
        look.picture(Path(f"board-{tab}.png"), whole=False)
        nothing = look.page.get_by_text(re.compile("No .* (was|were) found"))
        assert nothing.locator("visible=true").count() == 0
        assert look.strangers == []
        assert [line for line in look.complaints if line.startswith("error")] == []
