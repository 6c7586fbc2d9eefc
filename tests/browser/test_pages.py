"""The pages that commands write: no script, nothing fetched, legible on a phone and in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agrivision.cli import main
from tests.browser.looking import DESK, PHONE, looking
from tests.inference.small import smooth, trained_model, write_scene
from tests.ranks import run
from tests.training.runs import arguments


@pytest.fixture(scope="session")
def pages(
    interrupted: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in ("report", "compared", "inspect")}
    assert main(["report", str(interrupted), "--out", str(found["report"])]) == 0
    other = folder / "other"
    assert run(arguments(dataset, other, optimizer__lr=1e-4, training__epochs=1)) == [0]
    both = [str(interrupted), str(other)]
    assert main(["report", *both, "--out", str(found["compared"]), "--tiles", "0"]) == 0
    assert main(["inspect", str(dataset), "--page", str(found["inspect"])]) == 0
    checkpoint = str(trained_model(folder / "run").folder)
    scenes = []
    for number in range(2):
        image = smooth(np.random.default_rng(number), 180, 200)
        scenes.append(str(write_scene(folder / "scenes" / f"north {number}.tif", image)))
    maps = folder / "maps"
    assert main(["predict", "--checkpoint", checkpoint, *scenes, "--out", str(maps), "--polygons"]) == 0
    return found | {"scene": maps / "north 0.html", "scenes": maps / "index.html"}


KINDS = ("report", "compared", "inspect", "scene", "scenes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_page_is_fit_to_be_read(
    kind: str, dark: bool, size: tuple[int, int], pages: dict[str, Path], browser: Any
) -> None:
    with looking(browser, dark=dark) as look:
        look.open(pages[kind].as_uri(), size)
        assert look.broken() == []
        assert look.spill() == 0
        look.picture(Path(f"{kind}-{size[0]}{'-dark' if dark else ''}.png"))
        assert look.violations() == []
        assert (look.complaints, look.strangers) == ([], [])


def test_the_looking_sees_what_is_wrong(tmp_path: Path, browser: Any) -> None:
    """Or the others could not fail."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html><head><title>x</title></head><body><img src='nowhere.png'>"
        "<p style='color: #aaa'>faint</p><div style='width: 3000px'>wide</div>"
        "<img src='http://192.0.2.1/x.png' alt='far'><script>nothing()</script></body></html>"
    )
    with looking(browser) as look:
        look.page.goto(page.as_uri(), wait_until="commit")
        look.page.wait_for_selector("img[alt=far]", state="attached")
        assert look.strangers == ["http://192.0.2.1/x.png"]
        assert look.spill() > 1000
        assert {line.partition(":")[0] for line in look.violations()} >= {"color-contrast", "image-alt"}
        assert any("nothing is not defined" in line for line in look.complaints)
        assert any("nowhere.png" in line for line in look.broken())
