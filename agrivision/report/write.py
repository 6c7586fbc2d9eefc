"""From run directories to the page's file, and to files of its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from agrivision.charts import Chart
from agrivision.errors import BadInput
from agrivision.report import figures
from agrivision.report.history import History, read_history
from agrivision.report.page import display_names, page
from agrivision.report.tiles import draw_tiles
from agrivision.storage import storage_error, write_atomically


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    tiles: int,
    charts: Path | None = None,
    data: Path | None = None,
    now: float | None = None,
) -> None:
    """Write a page about runs; nothing is written into their directories.

    Args:
        runs: their directories; they may be copies, or still be written.
        out: of the page.
        tiles: of each class, best and worst, that are drawn; 0 for none.
        charts: folder for the figures, too; made if it is missing.
        data: where the runs' data set is now; None looks where their configurations say.
        now: seconds since 1970; None asks the clock.

    Raises:
        BadInput: a run cannot be reported on, or is given twice.
        StorageError, NotWritable: the disk refused.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise BadInput("a run is given twice: name each once")
    now = time.time() if now is None else now
    histories = [read_history(run, now, data) for run in runs]
    drawn = [draw_tiles(history, tiles) if tiles else None for history in histories]
    content = page(histories, drawn)
    if charts is not None:
        _write_charts(charts, histories)
    write_atomically(out, content)


def _write_charts(folder: Path, histories: Sequence[History]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    names = display_names([history.run.path for history in histories])
    prefixes = figures.file_names(names)
    for history, name in zip(histories, names, strict=True):
        prefix = f"{prefixes[name]}-" if len(histories) > 1 else ""
        for chart in _charts_of(history):
            write_atomically(folder / f"{prefix}{chart.name}.svg", chart.svg(outlines=True))
    if len(histories) > 1:
        for chart in figures.compared(histories, names):
            write_atomically(folder / f"{chart.name}.svg", chart.svg(outlines=True))


def _charts_of(history: History) -> list[Chart]:
    charts = [*figures.curves(history), *figures.speed(history)]
    shown = history.metrics.best or history.metrics.last
    if shown is not None and shown.confusion:
        charts.append(figures.confusion(shown))
    return charts
