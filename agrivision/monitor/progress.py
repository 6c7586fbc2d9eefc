"""How far a long piece of work is: a bar on a terminal, a line now and then in a log.

The lines go through the package's logger, so that `configure_log` decides who sees them. While a bar
is on the screen they go at DEBUG level, that is, into the log file only.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.text import Text

logger = logging.getLogger(__name__)

Field = float | str  # an int is a float to the type checker
_REDRAW_SECONDS = 0.2


def progress(
    description: str,
    total: int | None = None,
    *,
    unit: str = "step",
    done: int = 0,
    show: bool = True,
    seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A `Progress` to use in a `with` statement.

    Args:
        description: what is being done, one or two words.
        total: how much there is to do in `unit`; None where nobody knows.
        unit: noun in the singular.
        done: how much an earlier run did; it does not count for the rate.
        show: whether a person should see it: False on all ranks but one.
        seconds: time between two lines where there is no terminal.
        clock: seconds since any moment.
    """
    bar = _Bar(description, unit) if show and sys.stderr.isatty() else None
    level = logging.INFO if show and bar is None else logging.DEBUG
    return Progress(
        description, total, unit=unit, done=done, bar=bar, level=level, seconds=seconds, clock=clock
    )


class Progress:
    """Counts what is done and shows it; made by `progress`."""

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str,
        done: int,
        bar: _Bar | None,
        level: int,
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._description, self._unit = description, unit
        self._total, self._first, self._done = total, done, done
        self._bar, self._level = bar, level
        self._seconds, self._clock = seconds, clock
        self._fields: dict[str, Field] = {}
        self._start = self._last_line = self._last_drawn = clock()

    def __enter__(self) -> Self:
        self._start = self._last_line = self._last_drawn = self._clock()
        if self._bar is not None:
            self._bar.start()
            self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        if error is None or self._done > self._first:
            self._line(ended=True)

    @property
    def done(self) -> int:
        """What is done so far, the earlier run's part included."""
        return self._done

    def advance(self, count: int = 1, **fields: Field) -> None:
        """Count `count` more units as done.

        Args:
            count: how many.
            fields: values to show beside the count, by name; a name keeps its value until it gets
                another. Names that are no identifiers go as `**{"images/s": 812.0}`.
        """
        self._done += count
        self._fields.update(fields)
        now = self._clock()
        if self._bar is not None and now - self._last_drawn >= _REDRAW_SECONDS:
            self._last_drawn = now
            self._draw()
        if now - self._last_line >= self._seconds:
            self._last_line = now
            self._line()

    def total(self, count: int | None) -> None:
        """Set how much there is to do, for work whose amount shows only on the way."""
        self._total = count

    def note(self, text: str) -> None:
        """Log a line; a bar on the screen moves out of its way."""
        logger.info("%s", text)

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.draw(self._done, self._total, self._rate(), self._left(), self._values())

    def _line(self, *, ended: bool = False) -> None:
        logger.log(self._level, "%s", self._text(ended=ended))

    def _rate(self) -> float | None:
        """Units in a second since the start; None before there is anything to divide."""
        elapsed, count = self._clock() - self._start, self._done - self._first
        return count / elapsed if elapsed > 0 and count > 0 else None

    def _left(self) -> float | None:
        """Seconds to go at that rate; None where the total or the rate is unknown."""
        rate = self._rate()
        if self._total is None or rate is None:
            return None
        return max(self._total - self._done, 0) / rate

    def _values(self) -> list[str]:
        return [f"{name} {_number(value)}" for name, value in self._fields.items()]

    def _text(self, *, ended: bool) -> str:
        parts = [f"{self._description}: {_amount(self._done, self._total)} {_plural(self._unit)}"]
        rate, left = self._rate(), self._left()
        if rate is not None:
            parts.append(f"{_number(rate)} {_plural(self._unit)}/s")
        if left is not None and not ended:
            parts.append(f"{clock_time(left)} left")
        else:
            parts.append(f"in {clock_time(self._clock() - self._start)}")
        return ", ".join(parts + self._values())


class _Bar:
    """A rich progress bar on stderr, drawn only when asked to.

    Without rich's own thread: `prepare` forks workers, and a fork while another thread holds a lock
    can hang the child.
    """

    def __init__(self, description: str, unit: str) -> None:
        self._unit = unit
        self._rich = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            _InfoColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self._rich.add_task(escape(description), total=None, info="")

    def start(self) -> None:
        self._rich.start()

    def stop(self) -> None:
        self._rich.stop()

    def draw(
        self, done: int, total: int | None, rate: float | None, left: float | None, values: list[str]
    ) -> None:
        parts = [f"{_amount(done, total)} {_plural(self._unit)}"]
        if rate is not None:
            parts.append(f"{_number(rate)}/s")
        if left:
            parts.append(f"{clock_time(left)} left")
        info = "  ".join(parts + values)
        self._rich.update(self._task, completed=done, total=total, info=info, refresh=True)


class _InfoColumn(rich.progress.ProgressColumn):
    """The task's numbers as plain text: brackets in a value are no markup."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(str(task.fields["info"]), no_wrap=True, overflow="ellipsis")


def clock_time(seconds: float) -> str:
    """`75` → `01:15`, `93784` → `1d 02:03:04`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def _amount(done: int, total: int | None) -> str:
    if total is None:
        return f"{done}"
    return f"{done}/{total} ({100 * done // total} %)" if total else f"{done}/{total}"


def _plural(unit: str) -> str:
    return f"{unit}s"


def _number(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)
