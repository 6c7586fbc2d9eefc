"""GPUs of other machines, as recorded and as invented: drivers, kernels, memory and links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agrivision.doctor.finding import Verdict
from agrivision.doctor.gpus import (
    Driver,
    Gpu,
    Torch,
    examine_gpus,
    parse_driver,
    parse_links,
    read_driver,
    read_torch,
)
from tests.doctor.said import about, worse

GIB = 1 << 30
H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory=80 * GIB, free=79 * GIB, capability=(9, 0))
V100 = Gpu(name="Tesla V100-SXM2-16GB", memory=16 * GIB, free=16 * GIB, capability=(7, 0))
KERNELS = ("sm_80", "sm_90", "sm_100", "compute_120")
TORCH = Torch(version="2.15.0+cu132", cuda="13.2", nccl="2.28.3", kernels=KERNELS)
NEW = Driver(version="590.44.01", cuda="13.2")

HEAD = """\
Mon Nov 23 00:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
# As printed on a machine with eight GPUs in two halves; shortened to four. Its head is underlined.
SWITCHED = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tNV18\tNV18\tPXB\t0-47,96-143\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tNV18\tNV18\tNODE\t0-47,96-143\t0\t\tN/A\n"
    "GPU2\tNV18\tNV18\t X \tNV18\tSYS\t48-95,144-191\t1\t\tN/A\n"
    "GPU3\tNV18\tNV18\tNV18\t X \tSYS\t48-95,144-191\t1\t\tN/A\n"
    "NIC0\tPXB\tNODE\tSYS\tSYS\t X \n"
    "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
)
PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity
GPU0     X      NV4     PHB     SYS     0-15    0
GPU1    NV4      X      SYS     SYS     0-15    0
GPU2    PHB     SYS      X      PIX     16-31   1
GPU3    SYS     SYS     PIX      X      16-31   1
"""


def with_gpus(*gpus: Gpu) -> Torch:
    return replace(TORCH, gpus=gpus)


def test_without_a_gpu_that_is_a_fact() -> None:
    found = list(examine_gpus(replace(TORCH, error="No CUDA GPUs are available"), None, ""))
    assert worse(found) == []
    assert "no NVIDIA GPU here" in found[0].what
    assert worse(examine_gpus(Torch(version="2.15.0+cpu", cuda=None), None, "")) == []


def test_good_gpus_are_good() -> None:
    found = list(examine_gpus(with_gpus(*[H100] * 4), NEW, SWITCHED))
    assert worse(found) == []
    assert "bf16" in about(found, "GPU 2: NVIDIA H100").what
    assert "NCCL 2.28.3" in about(found, "NCCL").what
    assert about(found, "NVLink").what == "GPUs 0-1, 0-2, 0-3, 1-2, 1-3, 2-3: NVLink, 18 lanes"


def test_a_build_for_processors_beside_a_driver_is_named() -> None:
    (found,) = examine_gpus(Torch(version="2.15.0+cpu", cuda=None), NEW, "")
    assert (found.verdict, "processors only" in found.what) == (Verdict.BAD, True)


def test_a_driver_that_is_too_old_is_named() -> None:
    (found,) = examine_gpus(replace(TORCH, error="old"), parse_driver(HEAD), "")
    assert found.verdict == Verdict.BAD
    assert "driver 550.54.15, which knows CUDA up to 12.4" in found.what
    assert "for CUDA 12" in found.advice


def test_a_minor_version_behind_is_compatible() -> None:
    torch = replace(with_gpus(H100), cuda="12.9")
    assert worse(examine_gpus(torch, parse_driver(HEAD), "")) == []


def test_a_driver_that_does_not_answer_is_named() -> None:
    (found,) = examine_gpus(TORCH, Driver(error="NVIDIA-SMI has failed"), "")
    assert (found.verdict, "NVIDIA-SMI has failed" in found.what) == (Verdict.BAD, True)


def test_what_torch_says_of_cuda_is_handed_on() -> None:
    (found,) = examine_gpus(replace(TORCH, error="system not yet initialized"), NEW, "")
    assert (found.verdict, "system not yet initialized" in found.what) == (Verdict.BAD, True)


def test_gpus_that_a_job_did_not_ask_for_are_a_warning() -> None:
    (found,) = examine_gpus(TORCH, NEW, "")
    assert (found.verdict, "sees no GPU" in found.what) == (Verdict.CAREFUL, True)


def test_a_gpu_without_kernels_is_named() -> None:
    found = about(examine_gpus(with_gpus(V100), NEW, ""), "GPU 0")
    assert (found.verdict, "has kernels for sm_80, sm_90" in found.what) == (Verdict.BAD, True)


@pytest.mark.parametrize(
    ("capability", "fits"),
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((10, 3), True), ((12, 1), True), ((7, 5), False),
     ((11, 0), False)],
)  # fmt: skip
def test_kernels_run_on_their_generation_and_what_compiles_on_later_ones(
    capability: tuple[int, int], fits: bool
) -> None:
    found = about(examine_gpus(with_gpus(replace(H100, capability=capability)), NEW, ""), "GPU 0")
    assert (found.verdict == Verdict.GOOD) == fits


def test_a_gpu_without_bf16_is_a_warning() -> None:
    torch = replace(with_gpus(V100), kernels=("sm_70",))
    found = about(examine_gpus(torch, NEW, ""), "GPU 0")
    assert (found.verdict, "no bf16" in found.what) == (Verdict.CAREFUL, True)


def test_a_gpu_that_others_use_is_a_warning() -> None:
    torch = with_gpus(H100, replace(H100, free=40 * GIB))
    assert worse(examine_gpus(torch, NEW, SWITCHED)) == [
        ("careful", "GPU 1: 40.0 GiB are in use already")
    ]


def test_unlike_gpus_are_a_warning() -> None:
    torch = with_gpus(H100, replace(H100, name="NVIDIA A100-SXM4-80GB", capability=(8, 0)))
    assert worse(examine_gpus(torch, NEW, SWITCHED)) == [("careful", "GPUs of different kinds")]


def test_several_gpus_without_nccl_are_named() -> None:
    torch = replace(with_gpus(H100, H100), nccl=None)
    assert worse(examine_gpus(torch, NEW, SWITCHED)) == [("bad", "this torch has no NCCL")]


def test_links_as_nvidia_smi_prints_them() -> None:
    assert parse_links(SWITCHED) == dict.fromkeys(
        [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], "NV18"
    )
    assert parse_links(PAIRS) == {
        (0, 1): "NV4",
        (0, 2): "PHB",
        (0, 3): "SYS",
        (1, 2): "SYS",
        (1, 3): "SYS",
        (2, 3): "PIX",
    }
    assert parse_links("") == {}


def test_a_long_way_between_gpus_is_a_warning() -> None:
    found = list(examine_gpus(with_gpus(*[H100] * 4), NEW, PAIRS))
    assert worse(found) == [
        ("careful", "GPUs 0-3, 1-2, 1-3: linked through the link between processors")
    ]
    assert about(found, "GPUs 2-3").what.endswith("one PCIe switch")


def test_where_nvidia_smi_is_silent_torch_is_asked() -> None:
    torch = with_gpus(H100, H100)
    assert worse(examine_gpus(torch, None, "")) == [
        ("careful", "GPUs 0-1: cannot read one another's memory")
    ]
    both = replace(torch, reaches=frozenset([(0, 1), (1, 0)]))
    assert worse(examine_gpus(both, None, "")) == []


def test_this_machine_is_read_without_an_error() -> None:
    torch = read_torch()
    assert torch.version.startswith("2.")
    assert list(examine_gpus(torch, read_driver(), "")) != []
