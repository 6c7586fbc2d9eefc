"""A trace of a few steps, on request: where the time goes, kernel by kernel."""

from __future__ import annotations

import gzip
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from agrivision.storage import make_private, replacing, write_atomically

# The first steps allocate memory, choose kernels and fill the queue of batches: they are not typical.
SKIPPED, WARM_UP, RECORDED = 6, 2, 5
_ROWS = 40

log = logging.getLogger(__name__)


@contextmanager
def profiled(folder: Path | None, rank: int) -> Iterator[Callable[[], None]]:
    """Record five steps of the block.

    Args:
        folder: where `rank-N.trace.json.gz`, for Perfetto or chrome://tracing, and the table
            `rank-N.txt` go; None records nothing.
        rank: of this process.

    Yields:
        To be called after each step.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    if folder is None:
        yield lambda: None
        return
    make_private(folder)
    written: list[Path] = []
    cuda = torch.cuda.is_available()
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda,
        schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=lambda recorded: written.append(_write(recorded, folder, rank, cuda=cuda)),
        acc_events=True,
    ) as recorder:
        yield recorder.step
    if written:
        log.info(
            "profile of %d steps: %s; open it in Perfetto or chrome://tracing", RECORDED, written[0]
        )
    else:
        log.warning("no profile: it takes %d steps in a row", SKIPPED + WARM_UP + RECORDED)


def _write(recorded: profile, folder: Path, rank: int, *, cuda: bool) -> Path:
    trace, table = folder / f"rank-{rank}.trace.json.gz", folder / f"rank-{rank}.txt"
    with TemporaryDirectory(dir=folder) as beside:
        plain = Path(beside) / "trace.json"
        recorded.export_chrome_trace(str(plain))
        with (
            plain.open("rb") as source,
            replacing(trace) as file,
            gzip.GzipFile(fileobj=file, mode="wb") as packed,
        ):
            shutil.copyfileobj(source, packed)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    text = recorded.key_averages().table(sort_by=order, row_limit=_ROWS)
    write_atomically(table, text.encode())
    return trace
