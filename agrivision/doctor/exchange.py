"""A sum over the ranks of this node, as training makes one in every step: does it come out, and right.

python -m agrivision.doctor.exchange FILE RANK RANKS BACKEND      one rank of it
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import agrivision
from agrivision.doctor.finding import Finding, Topic

_EXCHANGE = Topic("Ranks")
_SECONDS = 180.0  # torch is imported by each
_POLL_SECONDS = 0.05
_VALUES = 1 << 20
_MOST_RANKS = 8


def examine_exchange(gpus: int, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Let ranks on this node add something up: two over gloo, and one for each GPU over NCCL.

    Args:
        gpus: that torch sees.
        environment: of the ranks.
    """
    yield _judge("gloo", 2, environment)
    if gpus > 1:
        yield _judge("nccl", min(gpus, _MOST_RANKS), environment)


def _judge(backend: str, ranks: int, environment: Mapping[str, str]) -> Finding:
    begin = time.monotonic()
    error = add_up(backend, ranks, environment)
    if not error:
        return _EXCHANGE.good(
            f"{ranks} ranks add up over {backend} in {time.monotonic() - begin:.0f} s, start included"
        )
    hint = (
        "NCCL_DEBUG=INFO says more" if backend == "nccl" else "is the loopback `lo` up, may it be used?"
    )
    return _EXCHANGE.bad(
        f"{ranks} ranks over {backend}: {error}", f"runs of several ranks fail so: {hint}"
    )


def add_up(
    backend: str, ranks: int, environment: Mapping[str, str] = os.environ, seconds: float = _SECONDS
) -> str:
    """Start ranks that add something up; returns what went wrong, empty where nothing did.

    Args:
        backend: of torch.distributed.
        ranks: how many.
        environment: of the ranks.
        seconds: after which they are ended.
    """
    own = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(agrivision.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
        ),
    }
    with tempfile.TemporaryDirectory(prefix="agrivision-doctor-") as folder:
        command = [sys.executable, "-m", "agrivision.doctor.exchange", f"{folder}/meeting"]
        errors = [Path(folder, f"rank-{rank}.err") for rank in range(ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, error in enumerate(errors):
                words = [*command, str(rank), str(ranks), backend]
                with error.open("wb") as file:
                    processes.append(
                        subprocess.Popen(
                            words, env={**environment, **own}, stdout=subprocess.DEVNULL, stderr=file
                        )
                    )
            return _first_fault(processes, errors, seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _first_fault(
    processes: Sequence[subprocess.Popen[bytes]], errors: Sequence[Path], seconds: float
) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        for error, code in zip(errors, codes, strict=True):
            if code:
                lines = error.read_text(errors="replace").strip().splitlines()
                return lines[-1] if lines else f"a rank ended with {code}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(_POLL_SECONDS)
    return f"no answer within {seconds:.0f} s"


def main(argv: Sequence[str]) -> None:
    """Be one rank: add up what all have, and look whether it is right."""
    file, rank, ranks, backend = argv[0], int(argv[1]), int(argv[2]), argv[3]
    import torch  # noqa: PLC0415 - who starts the ranks does not need it
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=_SECONDS)
    dist.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=limit
    )
    values = torch.full((_VALUES,), 2.0**rank, device=device)
    dist.all_reduce(values)
    if not bool((values == 2.0**ranks - 1).all()):
        raise SystemExit("the sum over the ranks is wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
