"""The library page: its code runs, in its order, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio

REPOSITORY = Path(__file__).parents[1]

# What makes it a matter of seconds; everything else is run as it is printed.
SMALLER = {
    '"--optimizer.lr", "1e-3"]': '"--optimizer.lr", "1e-3", "--data.crop", "32", "--data.threads", "0",'
    ' "--model.base_channels", "4", "--training.max_steps", "2"]',
    "512, 512": "64, 64",
}


def made_small(block: str) -> str:
    for printed, smaller in SMALLER.items():
        block = block.replace(printed, smaller)
    if "prepare(" in block:  # worker processes would import pytest's main module
        block = block.replace('"data/av2021")', '"data/av2021"), PrepareOptions(workers=1)', 1)
        block = f"from agrivision import PrepareOptions\n{block}"
    return block


def test_the_library_page_runs(fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Agriculture-Vision-2021").symlink_to(fields)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", width=70, height=50, count=4, dtype="uint8"
    ) as scene:
        scene.write(np.random.default_rng(0).integers(0, 256, (4, 50, 70), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    for number, block in enumerate(blocks):
        names: dict[str, object] = {"__name__": "__main__"}  # each block stands by itself
        exec(compile(made_small(block), f"library.md block {number}", "exec"), names)
        if "class_ids" in names:
            class_ids = names["class_ids"]
            assert isinstance(class_ids, np.ndarray) and class_ids.shape == (50, 70)
