"""Every reader, a few bad inputs each; `make fuzz` tries a hundred thousand."""

from __future__ import annotations

import json
import signal
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import worker
from tests.fuzz.targets import TARGETS

_EXAMPLES = {"config-file": 12, "command-line": 12, "zip": 60, "scene": 40, "label-raster": 40}


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request, tmp_path_factory):
    made = TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, made


def test_a_reader_is_right_or_refuses(target):
    name, made = target
    for seed in made.seeds:
        made.run(seed)

    @settings(
        max_examples=_EXAMPLES.get(name, 120),
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(st.binary(max_size=64))
    def try_some(program: bytes) -> None:
        made.run(made.mutate(made.seeds, program))

    try_some()


def test_what_computes_for_too_long_is_a_hang(tmp_path, monkeypatch):
    """And what a busy machine lets wait is none."""
    monkeypatch.setattr(worker, "SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, worker._hang)

    def run(data: bytes) -> None:
        if data == b"waits":
            time.sleep(0.5)
        while data == b"computes":
            pass

    try:
        trial = worker.Trial(run, 3, tmp_path)
        for data in (b"waits", b"computes", b"fine"):
            trial(data)
    finally:
        signal.signal(signal.SIGPROF, before)
    trial.report()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["inputs"] == 3 and list(report["findings"].values()) == [1]
    assert (tmp_path / "finding-0").read_bytes() == b"computes"
    assert "Hang: more than 0.2 seconds" in (tmp_path / "finding-0.txt").read_text()
