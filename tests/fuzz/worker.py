"""One engine at one target, in a process of its own: what `campaign` starts.

    python -m tests.fuzz.worker TARGET ENGINE INPUTS SEED FOLDER

Each input is put into FOLDER/now before it is tried, so that it is still there if the process dies.
Findings go into FOLDER, one file for each place in the code, and the counts into FOLDER/report.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of computing, on a machine that may be busy, before an input counts as a hang
MEMORY = 1 << 30  # bytes that the process may take beyond what it has when it begins
NOW_BYTES = 1 << 20  # room for the input that is being tried, and its count and length
_BATCH = 500  # examples of one run of hypothesis, which remembers all that it has tried
_MOST_FINDINGS = 20


class Hang(BaseException):
    """An input took too long; no reader may catch it."""


def _hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS:g} seconds of computing")


def _resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def open_files() -> int:
    """Descriptors that the process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Trial:
    """Tries inputs, counts them, and keeps what is found.

    Args:
        run: the target's.
        inputs: after which to end.
        folder: for findings and the report.
    """

    def __init__(self, run: Callable[[bytes], None], inputs: int, folder: Path) -> None:
        self._run, self._inputs, self._folder = run, inputs, folder
        self.count = 0
        self._findings: dict[str, int] = {}
        self._begin = time.monotonic()
        self._early: dict[str, int] = {}
        with (folder / "now").open("w+b") as file:
            file.truncate(NOW_BYTES)
            self._now = mmap.mmap(file.fileno(), NOW_BYTES)

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        self._now[:16] = self.count.to_bytes(8, "little") + len(data).to_bytes(8, "little")
        kept = data[: NOW_BYTES - 16]
        self._now[16 : 16 + len(kept)] = kept
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self._run(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and Hang too: all but the oracle's yes is a finding
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._keep(data, error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.count += 1
        if self.count == max(1, self._inputs // 10):
            self._early = self._measure()

    @property
    def over(self) -> bool:
        """Whether enough was tried."""
        return self.count >= self._inputs or len(self._findings) >= _MOST_FINDINGS

    def _keep(self, data: bytes, error: BaseException) -> None:
        from tests.fuzz.harness import place_of

        place = place_of(error)
        if place not in self._findings:
            name = f"finding-{len(self._findings)}"
            (self._folder / name).write_bytes(data)
            (self._folder / f"{name}.txt").write_text(f"{place}\n{type(error).__name__}: {error}\n")
        self._findings[place] = self._findings.get(place, 0) + 1

    def _measure(self) -> dict[str, int]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator only keeps for later is no leak
        return {"resident": _resident(), "open_files": open_files()}

    def report(self) -> None:
        """Write the counts."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        content: dict[str, Any] = {
            "inputs": self.count,
            "seconds": time.monotonic() - self._begin,
            "findings": self._findings,
            "early": self._early,
            "late": self._measure(),
            "peak": peak,
        }
        (self._folder / "report.json").write_text(json.dumps(content))


def memory_folder() -> Path:
    """Where files cost no disk."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _hypothesis(target: Any, trial: Trial, seed: int) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    for data in target.seeds:
        trial(data)
    while not trial.over:
        examples = min(_BATCH, trial._inputs - trial.count)

        @seeded(seed * 1_000_003 + trial.count)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.binary(max_size=96))
        def some(program: bytes) -> None:
            trial(target.mutate(target.seeds, program))

        before = trial.count
        some()
        if trial.count == before:  # nothing is left to be drawn
            break


def _atheris(name: str, make: Callable[[], Any], trial_of: Callable[[Any], Trial], seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["agrivision", "launch"], enable_loader_override=False):
        target = make()
    trial = trial_of(target)
    corpus = trial._folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        trial(data)
        if trial.over:
            trial.report()
            os._exit(0)  # libFuzzer would do the same, without a report

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        """Every other time by our own mutations, which know of trees and checksums."""
        if number % 2:
            changed = atheris.Mutate(data, max_size)
        else:
            program = _noise(number, 4 + number % 61)
            changed = target.mutate(target.seeds, program)
        return bytes(changed[:max_size])

    arguments = [name, f"-seed={seed + 1}", "-runs=1000000000", "-timeout=60", "-print_final_stats=0"]
    arguments += [f"-artifact_prefix={trial._folder}/", "-rss_limit_mb=0", "-malloc_limit_mb=0"]
    arguments += ["-verbosity=0", "-max_len=65536", str(corpus)]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def _noise(seed: int, size: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


def main(name: str, engine: str, inputs: int, seed: int, folder: Path) -> None:
    """Try a target."""
    if engine == "atheris":
        import atheris  # noqa: F401 - fails at once where it is not installed
    signal.signal(signal.SIGPROF, _hang)
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()))

        def make() -> Any:
            from tests.fuzz.targets import TARGETS

            return TARGETS[name](Path(place))

        def trial_of(target: Any) -> Trial:
            _quiet()
            limit = _mapped() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return Trial(target.run, inputs, folder)

        if engine == "atheris":
            _atheris(name, make, trial_of, seed)
            return
        target = make()
        if engine == "again":  # one input, its error shown
            target.run((folder / "input").read_bytes())
            return
        trial = trial_of(target)
        _hypothesis(target, trial, seed)
        trial.report()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
