"""JSON from elsewhere: parsed within bounds, and each value of the type that it should have.

Whoever can write a file can write its checksum as well, so a checksum alone does not make `"64"` a
number or `../..` a name. All of these raise ValueError, which the readers turn into their own errors.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST = 2**63 - 1  # of any count: what files and numpy can hold
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def parse(content: bytes | str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything that was written here.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def whole(value: Any, least: int = 0, most: int = MOST) -> int:
    """A whole number within bounds; neither text nor true nor 3.0.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is no whole number from {least} to {most}")
    return value


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is something else.
    """
    if type(value) not in (int, float) or abs(value) > MOST**16 or not math.isfinite(value):
        raise ValueError(f"{shown(value)} is no finite number")
    return float(value)


def share(value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: it is something else.
    """
    if not 0 <= number(value) <= 1:
        raise ValueError(f"{shown(value)} is not between 0 and 1")
    return float(value)


def text(value: Any) -> str:
    """Text without a zero, which ends it for the operating system, and that UTF-8 can hold.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not str or "\0" in value:
        raise ValueError(f"{shown(value)} is no text")
    value.encode()  # half of a surrogate pair: UnicodeEncodeError is a ValueError
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        ValueError: it is something else.
    """
    return tuple(map(text, items(value)))


def label(value: Any) -> str:
    """Text that can be shown in one line.

    Raises:
        ValueError: it is something else.
    """
    if not text(value).isprintable():
        raise ValueError(f"{shown(value)} cannot be shown")
    return str(value)


def name(value: Any) -> str:
    """Text that can name a file or a folder and leads nowhere else: letters, digits, `_` and `-`.

    Raises:
        ValueError: it is something else.
    """
    if not _NAME.fullmatch(text(value)):
        raise ValueError(f"{shown(value)} is no plain name")
    return str(value)


def flag(value: Any) -> bool:
    """True or false.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not bool:
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


def items(value: Any) -> list[Any]:
    """A list.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not list:
        raise ValueError(f"{shown(value)} is no list")
    return value


def entries(value: Any) -> dict[str, Any]:
    """An object.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not dict:
        raise ValueError(f"{shown(value)} is no object")
    return value


def shown(value: Any) -> str:
    """A value as a message can show it, however large it is."""
    if type(value) in (list, dict):
        return "a list" if type(value) is list else "an object"
    if type(value) is int and abs(value) > MOST:
        return "a number of too many digits"
    return repr(value) if len(str(value)) <= 60 else f"{str(value)[:60]!r} …"
