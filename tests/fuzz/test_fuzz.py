"""Every reader, a few bad inputs each; `make fuzz` tries a hundred thousand."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import campaign, worker
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


def test_what_waits_for_too_long_is_ended_and_its_input_kept(tmp_path, monkeypatch):
    """Native code that hangs: no alarm of Python's ends it, another process does."""
    monkeypatch.setattr(campaign, "_STUCK_SECONDS", 1.0)
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tests.fuzz.worker import Trial

        def run(data):
            time.sleep(600 if data == b"waits" else 0.1)

        trial = Trial(run, 100, Path(sys.argv[1]))
        for data in [b"fine"] * 15 + [b"waits", b"never tried"]:
            trial(data)
    """)
    begin = time.monotonic()
    code = campaign._watched([sys.executable, "-c", program, str(tmp_path)], tmp_path)
    assert code == -signal.SIGABRT and time.monotonic() - begin < 300
    outcome = campaign.Outcome("target", "engine")
    campaign._read_report(outcome, tmp_path, code)
    assert outcome.inputs == 15
    assert list(outcome.findings.values()) == [1] and "ended with -6" in next(iter(outcome.findings))
    assert (tmp_path / "finding-last").read_bytes() == b"waits"
    assert " in run\n" in (tmp_path / "output").read_text()  # where it was
