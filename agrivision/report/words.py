"""Times, counts and scores as people read them."""

from __future__ import annotations

import time

from agrivision.pages import DASH


def score_words(value: float | None) -> str:
    """A score from 0 to 1."""
    return DASH if value is None else f"{value:.3f}"


def time_words(seconds: float | None) -> str:
    """A moment, from seconds since 1970."""
    if seconds is None or not 0 <= seconds < 2**36:
        return DASH
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def span_words(seconds: float | None) -> str:
    """A stretch of time in its two largest units."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def hours_words(seconds: float | None) -> str:
    """A stretch of time in hours alone, for what is added up or paid for."""
    if seconds is None:
        return DASH
    hours = seconds / 3600
    return f"{hours:.3f}" if hours < 1 else f"{hours:,.1f}"


def energy_words(joules: float) -> str:
    """Energy in kilowatt hours, as it is paid for."""
    hours = joules / 3.6e6
    return f"{hours:.3g} kWh" if hours < 100 else f"{hours:,.0f} kWh"


def rate_words(value: float | None) -> str:
    """Something per second, with three digits."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
