"""What a driver tells reaches the record, and a driver in trouble costs nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from agrivision.distributed import Ranks
from agrivision.monitor.gpus import Driver, Gpus, Reading, reader
from agrivision.world import World


class Refused(Exception):
    """As NVIDIA's library raises."""


@dataclass
class Library:
    """NVIDIA's library, for one GPU; what it refuses raises."""

    refuses: tuple[str, ...] = ()
    joules: float = 100.0
    asked: list[str] = field(default_factory=list)
    NVMLError = Refused

    def _answer(self, name: str, value: Any) -> Any:
        self.asked.append(name)
        if name in self.refuses:
            raise Refused
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return str(self._answer("handle", f"handle of {uuid}"))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        assert handle == "handle of GPU-1"
        return self._answer("utilisation", type("Rates", (), {"gpu": 87})())

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return self._answer("memory", type("Memory", (), {"used": 3 << 30})())

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("power", 250_500))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:  # noqa: N802
        self.joules += 50
        return float(self._answer("energy", 1000 * self.joules))


def alone() -> Ranks:
    return Ranks(World())


def test_what_the_driver_tells() -> None:
    gpus = Gpus(alone(), Driver("GPU-1", Library()), patience=30)
    for _ in range(2):  # energy is what was spent since the last time, not since the driver was loaded
        assert gpus.take() == [
            {"utilisation": 0.87, "memory_gib": 3.0, "power_watts": 250.5, "energy_joules": 50.0}
        ]


@pytest.mark.parametrize("refused", ["utilisation", "memory", "power", "energy"])
def test_what_it_does_not_tell_is_left_out(refused: str) -> None:
    library = Library(refuses=(refused,))
    (told,) = Gpus(alone(), Driver("GPU-1", library), patience=30).take()
    names = ["utilisation", "memory_gib", "power_watts", "energy_joules"]
    assert list(told) == [name for name in names if not name.startswith(refused)]


@pytest.mark.parametrize("refused", ["init", "handle"])
def test_a_driver_that_knows_no_such_gpu(refused: str) -> None:
    assert Gpus(alone(), Driver("GPU-1", Library(refuses=(refused,))), patience=30).take() == [{}]


def test_without_a_gpu_there_is_nothing_to_ask() -> None:
    assert reader(torch.device("cpu")) is None
    assert Gpus(alone(), None).take() == []


def test_a_driver_that_hangs_is_waited_for_once() -> None:
    calls, hang = [], threading.Event()

    def read() -> Reading:
        calls.append(None)
        if len(calls) == 2:
            hang.wait()
        return Reading(utilisation=0.5, energy_joules=10.0 * len(calls))

    gpus = Gpus(alone(), read, patience=30)
    gpus._patience = 0.0  # the first answer is there
    assert [gpus.take() for _ in range(100)] == [[{}]] * 100
    assert len(calls) == 2
    hang.set()
    assert gpus._thread is not None
    gpus._thread.join(30)
    gpus._patience = 30
    # The answer that came late is taken, and nothing that was spent is lost.
    assert gpus.take() == [{"utilisation": 0.5, "energy_joules": 10.0}]
    assert len(calls) == 2
    assert gpus.take() == [{"utilisation": 0.5, "energy_joules": 10.0}]
    assert len(calls) == 3


def test_the_first_answer_is_waited_for() -> None:
    """The library is imported and the GPU found meanwhile: without it, energy would begin later."""

    def read() -> Reading:
        time.sleep(0.2)
        return Reading(energy_joules=7.0)

    assert Gpus(alone(), read, patience=0.0)._energy == 7.0


def test_each_rank_fills_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over the ranks, here by hand: NaN in a row is that rank's alone."""
    others = torch.zeros(3, 4, dtype=torch.float64)
    others[0] = torch.tensor([0.1, 1.0, 100.0, 5.0])
    others[2] = torch.tensor([0.3, torch.nan, torch.nan, torch.nan])
    ranks = Ranks(World(rank=1, size=3))
    monkeypatch.setattr(ranks, "sum", lambda table: table + others)
    found = Gpus(ranks, lambda: Reading(utilisation=0.2), patience=30).take()
    assert [gpu["utilisation"] for gpu in found] == [0.1, 0.2, 0.3]
    assert [len(gpu) for gpu in found] == [4, 1, 1]
