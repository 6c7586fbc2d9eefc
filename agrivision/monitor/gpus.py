"""What the GPUs of a run do, as their driver tells: utilisation, memory, power, energy.

The driver answers in less than a millisecond as a rule, but one that is busy takes longer, and one in
trouble may never answer. So a thread asks it, and the training waits for the answer for a moment only;
while an answer is outstanding nobody asks, and nobody waits.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from agrivision.distributed import Ranks

_PATIENCE = 0.02  # seconds that a step may wait for the driver
_FIRST_PATIENCE = 5.0  # the driver is found, and its library imported
_NAMES = ("utilisation", "memory_gib", "power_watts", "energy_joules")


@dataclass(frozen=True)
class Reading:
    """What a driver tells of one GPU; NaN where it does not.

    Attributes:
        utilisation: share of the last moment, up to a second, in which a kernel ran, 0 to 1.
        memory_gib: in use, by whomever.
        power_watts: drawn.
        energy_joules: since the driver was loaded.
    """

    utilisation: float = math.nan
    memory_gib: float = math.nan
    power_watts: float = math.nan
    energy_joules: float = math.nan


Read = Callable[[], Reading]


class Gpus:
    """The GPUs of a run, one a rank.

    Args:
        ranks: connected.
        read: asks the driver for this rank's GPU; None where there is none.
        patience: seconds that a call may wait for it.
    """

    def __init__(self, ranks: Ranks, read: Read | None, patience: float = _PATIENCE) -> None:
        self._ranks, self._read, self._patience = ranks, read, patience
        self._thread: threading.Thread | None = None
        self._latest = Reading()
        self._energy = self._ask(_FIRST_PATIENCE).energy_joules

    def take(self) -> list[dict[str, float]]:
        """What each rank's GPU does, in their order; to be called by all ranks, or by none.

        Returns:
            For each rank what its driver tells: `utilisation`, `memory_gib`,
            `power_watts`, and `energy_joules` since the last call that knew. Empty without GPUs.

        Raises:
            PeerLost: another rank is gone.
        """
        if self._read is None:
            return []
        mine = self._ask(self._patience)
        spent = mine.energy_joules - self._energy
        if not math.isnan(mine.energy_joules):
            self._energy = mine.energy_joules
        world = self._ranks.world
        table = torch.zeros(world.size, len(_NAMES), dtype=torch.float64)
        table[world.rank] = torch.tensor([*astuple(mine)[:-1], spent], dtype=torch.float64)
        return [
            {
                name: round(value, 3)
                for name, value in zip(_NAMES, row, strict=True)
                if math.isfinite(value)
            }
            for row in self._ranks.sum(table).tolist()
        ]

    def _ask(self, patience: float) -> Reading:
        """A reading, or one that came late; an empty one where the driver takes its time."""
        if self._read is None:
            return Reading()
        if self._thread is None:
            run = self._run
            self._thread = threading.Thread(target=run, args=[self._read], daemon=True, name="gpu")
            self._thread.start()
        self._thread.join(patience)
        if self._thread.is_alive():
            return Reading()
        self._thread = None
        return self._latest

    def _run(self, read: Read) -> None:
        self._latest = read()


def reader(device: torch.device) -> Read | None:
    """Asks the driver about a device; None where that is no GPU.

    Without NVIDIA's library, or where the driver does not know the device, readings are empty.
    """
    if device.type != "cuda":
        return None
    return Driver(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class Driver:
    """NVIDIA's driver, asked about one GPU.

    Args:
        uuid: of the GPU, however few of them this process sees.
        library: NVIDIA's, or one like it; None imports it.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._uuid, self._library = uuid, library
        self._handle: Any = None

    def __call__(self) -> Reading:
        """What the driver tells now."""
        try:
            library = self._library or importlib.import_module("pynvml")
        except ImportError:
            return Reading()
        try:
            if self._handle is None:
                library.nvmlInit()
                self._handle = library.nvmlDeviceGetHandleByUUID(self._uuid)
        except library.NVMLError:
            return Reading()

        def told(ask: str, value: Callable[[Any], float]) -> float:
            try:
                return value(getattr(library, ask)(self._handle))
            except library.NVMLError:
                return math.nan

        return Reading(
            utilisation=told("nvmlDeviceGetUtilizationRates", lambda rates: rates.gpu / 100),
            memory_gib=told("nvmlDeviceGetMemoryInfo", lambda memory: memory.used / 2**30),
            power_watts=told("nvmlDeviceGetPowerUsage", lambda milliwatts: milliwatts / 1000),
            energy_joules=told("nvmlDeviceGetTotalEnergyConsumption", lambda joules: joules / 1000),
        )
