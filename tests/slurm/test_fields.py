"""What a script asks for is what the real sbatch hears; tests/launch/test_fields.py only plays it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cluster import Cluster
from launch.resources import build
from launch.submit import Setting, script
from tests.launch.test_fields import options_of
from tests.slurm import jobs

TEXTS = [
    "plain", "it's", 'say "x"', "x' --wrap='id", 'x" --wrap="id', "back\\slash", "ends in \\", "\\'",
    "#no", "a #b", "$(id) `id` $HOME", "--wrap=id", "%j %x %A", "a;b|c&d<e>f", "*?[a]{b}", "ünï", "=",
    "a=b", "~",
]  # fmt: skip


@pytest.mark.faults
def test_a_text_arrives_as_it_was_given(cluster: Cluster, tmp_path: Path) -> None:
    for text in TEXTS:
        asked = build({"comment": text, "job_name": text, "time": "5"})
        setting = Setting(resources=asked, setup=(), python=("python",))
        file = tmp_path / "script.sh"
        file.write_text(script(tmp_path, tmp_path / "code", "name", setting))
        assert options_of(file.read_text())["comment"] == text
        number = jobs.submit(cluster, file, options=["--hold", f"--chdir={tmp_path}"])
        heard = cluster.run("squeue", "--noheader", f"--jobs={number}", "--Format=Comment:200,Name:200")
        row = heard.encode()
        assert (row[:200].decode().strip(), row[200:].decode().strip()) == (text, text)
        jobs.cancel(cluster, number)
