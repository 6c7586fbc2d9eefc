"""Tries every reader with very many bad inputs, each target in a process of its own.

    python -m tests.fuzz.campaign [--target NAME …] [--inputs 100000] [--engine hypothesis|atheris|both]

Prints a table of what was tried and found; the exit code is 1 where something was. Each finding's bytes
are kept, with the command that tries them again:

    python -m tests.fuzz.campaign --target NAME --again FILE

A finding is whatever is neither the right result nor a refusal in one line; an input that takes more
than five seconds of computing, a minute of waiting or a gigabyte of memory; a process that dies; memory
or open files that grow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

ENGINES = ("hypothesis", "atheris")
_STUCK_SECONDS = 60.0  # without a next input: native code that hangs, which no alarm interrupts
_POLL_SECONDS = 0.5
_LEAK_BYTES = 64 << 20  # that memory may grow after the first tenth: caches, the engine's own corpus
_NATIVE_LEAKS = {"jpeg2000": 8 << 10}  # bytes of each damaged file that a library of C keeps


@dataclass
class Outcome:
    """What one engine found at one target.

    Attributes:
        target: its name.
        engine: its name.
        inputs: tried.
        seconds: that it took.
        peak: bytes of memory at most.
        growth: bytes of memory after all inputs over those after a tenth.
        open_files: after a tenth, and after all.
        findings: what was found, and how often.
        note: why nothing was tried.
    """

    target: str
    engine: str
    inputs: int = 0
    seconds: float = 0.0
    peak: int = 0
    growth: int = 0
    open_files: tuple[int, int] = (0, 0)
    findings: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def row(self) -> str:
        """Of the table."""
        if self.note:
            return f"| {self.target} | {self.engine} | {self.note} | | | | | |"
        rate, files = self.inputs / max(self.seconds, 1e-9), "{} → {}".format(*self.open_files)
        memory = f"{self.peak / 2**20:.0f} | {self.growth / 2**20:+.1f} | {files}"
        numbers = f"{self.inputs:,} | {len(self.findings)} | {rate:,.0f} | {memory}"
        return f"| {self.target} | {self.engine} | {numbers} |"


HEAD = (
    "| target | engine | inputs | findings | inputs/s | peak MiB | growth MiB | open files |\n"
    "|---|---|---:|---:|---:|---:|---:|---|"
)


def attack(target: str, engine: str, inputs: int, seed: int, folder: Path) -> Outcome:
    """Try a target; findings are kept in the folder."""
    outcome = Outcome(target, engine)
    if importlib.util.find_spec(engine) is None:
        outcome.note = f"skipped: {engine} is not installed"
        return outcome
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    code = _run(target, engine, inputs, seed, folder)
    _read_report(outcome, folder, code)
    return outcome


def _run(target: str, engine: str, inputs: int, seed: int, folder: Path) -> int:
    """The exit code; negative where a signal ended it, our own if nothing went on any more."""
    command = [sys.executable, "-m", "tests.fuzz.worker", target, engine, str(inputs), str(seed)]
    return _watched([*command, str(folder)], folder)


def _watched(command: Sequence[str], folder: Path) -> int:
    """The exit code of a process that puts each input into FOLDER/now, and is ended if none follows."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        last, since = b"", time.monotonic()
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = _head(folder)
            if now != last or not now:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > _STUCK_SECONDS:
                process.send_signal(signal.SIGABRT)  # faulthandler then says where it was
                process.wait()
    return int(process.returncode)


def _head(folder: Path) -> bytes:
    """Count and length of the input that is being tried."""
    try:
        with (folder / "now").open("rb") as file:
            return file.read(16)
    except FileNotFoundError:
        return b""


def _read_report(outcome: Outcome, folder: Path, code: int) -> None:
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    except FileNotFoundError:
        report = {}
    if code != 0 or not report:
        _keep_the_last(folder)
        outcome.inputs = int.from_bytes(_head(folder)[:8], "little")
        outcome.findings[f"the process ended with {code}: see {folder / 'output'}"] = 1
    if report:
        early, late = report["early"], report["late"]
        outcome.inputs, outcome.seconds = report["inputs"], report["seconds"]
        outcome.peak, outcome.growth = report["peak"], late["resident"] - early["resident"]
        outcome.open_files = early["open_files"], late["open_files"]
        outcome.findings |= report["findings"]
        # What atheris puts between the lines to be guided by them keeps memory of its own.
        most = _LEAK_BYTES + outcome.inputs * _NATIVE_LEAKS.get(outcome.target, 0)
        if outcome.growth > most and outcome.engine != "atheris":
            outcome.findings[f"memory grew by {outcome.growth / 2**20:.0f} MiB"] = 1
        if late["open_files"] > early["open_files"]:
            outcome.findings["files were left open"] = 1


def _keep_the_last(folder: Path) -> None:
    """The input that was being tried when the process died."""
    head = _head(folder)
    if head:
        size = int.from_bytes(head[8:], "little")
        (folder / "finding-last").write_bytes((folder / "now").read_bytes()[16 : 16 + size])


def _again(target: str, file: Path) -> int:
    """Try one input, with its error in full."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copyfile(file, Path(name) / "input")
        command = [sys.executable, "-m", "tests.fuzz.worker", target, "again", "1", "0", name]
        return subprocess.run(command, check=False).returncode


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target and engine")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--out", type=Path, default=Path("fuzz-output"), help="folder of the findings")
    parser.add_argument(
        "--again", type=Path, default=None, help="try this file at --target, and no more"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 where something was found."""
    arguments = _arguments(argv)
    targets = arguments.target or list(TARGETS)
    if arguments.again is not None:
        return _again(targets[0], arguments.again)
    seed = int.from_bytes(os.urandom(3), "big") if arguments.seed is None else arguments.seed
    engines = ENGINES if arguments.engine == "both" else (arguments.engine,)
    print(f"seed {seed}\n\n{HEAD}", flush=True)
    found = False
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [
            pool.submit(
                attack, target, engine, arguments.inputs, seed, arguments.out / f"{target}-{engine}"
            )
            for target in targets
            for engine in engines
        ]
        outcomes = [future.result() for future in _told(running)]
    for outcome in outcomes:
        folder = arguments.out / f"{outcome.target}-{outcome.engine}"
        found |= bool(outcome.findings)
        for what, times in outcome.findings.items():
            print(f"\n{outcome.target}, {outcome.engine}: {what} ({times} times)")
        for file in sorted(folder.glob("finding-*[0-9t]")):
            print(f"    python -m tests.fuzz.campaign --target {outcome.target} --again {file}")
    return int(found)


def _told(running: Any) -> Any:
    """Each outcome's row as soon as it and those before it are there."""
    for future in running:
        print(future.result().row(), flush=True)
        yield future


if __name__ == "__main__":
    sys.exit(main())
