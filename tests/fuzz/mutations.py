"""Good inputs → bad ones, by a program: a string of bytes that both engines can draw and shrink.

The first byte chooses a seed; what follows is read as changes, each a kind and what it needs. An empty
program leaves the seed as it is. Changes of text as a tree (JSON) and as bytes can be mixed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

Mutate = Callable[[Sequence[bytes], bytes], bytes]

_HEAD = 512  # bytes at the beginning that are changed as often as all the rest
_LONGEST = 1 << 16  # bytes of an input, as far as the seeds are not longer
_LIES = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 511, 512, 513, 4096, 65_520, 65_535, 65_536)
_LIES += tuple(2**bits + more for bits in (24, 30, 31, 32, 40, 62, 63, 64) for more in (-1, 0))
_WIDTHS = (1, 2, 4, 8)
_MOST_CHANGES = 24
_MOST_PLACES = 2000


class Program:
    """Reads numbers from a program; zeros after its end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    @property
    def over(self) -> bool:
        return self._place >= len(self._content)

    def number(self, below: int) -> int:
        """The next number; two bytes where one would not do."""
        size = 1 if below <= 256 else 2 if below <= 1 << 16 else 4
        piece = self._content[self._place : self._place + size]
        self._place += size
        value = int.from_bytes(piece, "little")
        # Stretched over the whole range, so that every place of a long input can be met.
        return value % below if size < 4 else value * below >> 8 * len(piece) if piece else 0

    def choice(self, values: Sequence[Any]) -> Any:
        return values[self.number(len(values))]


def mutate_bytes(seeds: Sequence[bytes], program: bytes) -> bytes:
    """Any content: bits, cuts, repetitions, numbers that lie, pieces of another seed."""
    steps = Program(program)
    content = bytearray(steps.choice(seeds))
    change_bytes(content, seeds, steps)
    return bytes(content)


def change_bytes(content: bytearray, seeds: Sequence[bytes], steps: Program) -> None:
    """Follow the rest of a program."""
    longest = max(_LONGEST, *map(len, seeds))
    for _ in range(_MOST_CHANGES):
        if steps.over:
            break
        kind = steps.number(16)
        near = steps.number(2) == 0
        place = steps.number(min(len(content), _HEAD) + 1 if near else len(content) + 1)
        _change(content, kind, place, seeds, steps)
        del content[longest:]


def _change(content: bytearray, kind: int, place: int, seeds: Sequence[bytes], steps: Program) -> None:
    if kind <= 2 and place < len(content):
        content[place] ^= 1 << steps.number(8)
    elif kind <= 4 and place < len(content):
        content[place] = steps.number(256)
    elif kind <= 8:  # a number of a header that lies
        width, order = steps.choice(_WIDTHS), steps.choice(("little", "big"))
        lie = steps.choice(_LIES) & (1 << 8 * width) - 1
        content[place : place + width] = lie.to_bytes(width, order)
    elif kind == 9:  # cut, seldom: it ends much
        if steps.number(4) == 0:
            del content[place:]
    elif kind == 10:
        del content[place : place + 1 + steps.number(64)]
    elif kind == 11:
        content[place:place] = bytes([steps.number(256)]) * (1 + steps.number(16))
    elif kind == 12:  # again, or moved
        size = 1 + steps.number(256)
        piece = content[place : place + size]
        other = steps.number(len(content) + 1)
        content[other:other] = piece
    elif kind == 13:
        other = steps.choice(seeds)
        start = steps.number(len(other) + 1)
        size = 1 + steps.number(256)
        content[place : place + size] = other[start : start + size]
    elif kind == 14:
        content += bytes(steps.number(256) for _ in range(1 + steps.number(16)))
    else:  # add to a number: small lies
        content[place : place + 1] = bytes([(b + 1) % 256 for b in content[place : place + 1]])


DEEP = "\0deep\0"  # stands for more brackets than any parser can nest
_DIGITS = "\0digits\0"  # stands for a number of more digits than Python takes
_TWICE = "\0twice\0"
_STRANGERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 15, 16, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, 2**64, 10**30, 10**400, 0.5, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    float("-inf"), "", " ", "x", "0", "7", " 7 ", "\uff11\uff12", "1e3", "nan", "inf", "1/0",
    "1e999999999", "..", ".", "../../x", "/etc/passwd", "a/b", "a\0b", "a\nb", "\x1b[31m", "\u2028",
    "\ud800", "\xe4", "uint8", "float64", "object", "S99999999", "O", "x" * 5000, [], {}, [[]], [None],
    [1, 2, 3], ["a"], {"a": 1}, {"": {}}, DEEP, _DIGITS,
)  # fmt: skip


def mutate_json(seeds: Sequence[bytes], program: bytes) -> bytes:
    """JSON: values replaced, moved, dropped, doubled; now and then its bytes as well."""
    steps = Program(program)
    seed = steps.choice(seeds)
    as_bytes = steps.number(5) == 0
    if as_bytes:
        content = bytearray(seed)
        change_bytes(content, seeds, steps)
        return bytes(content)
    return mutate_tree(seed, steps)


def mutate_tree(seed: bytes, steps: Program) -> bytes:
    """Follow the rest of a program in the tree that a JSON seed is."""
    tree = [json.loads(seed)]
    for _ in range(_MOST_CHANGES):
        if steps.over:
            break
        _change_tree(tree, steps)
    text = json.dumps(tree[0])
    return _with_marks(text).encode("utf-8", "surrogatepass")


def _with_marks(text: str) -> str:
    if json.dumps(DEEP) in text:
        text = text.replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000, 1)
    return text.replace(json.dumps(_DIGITS), "9" * 5000).replace(json.dumps(_TWICE)[1:-1], "")


def _change_tree(tree: list[Any], steps: Program) -> None:
    places = list(_places(tree))
    if len(places) > _MOST_PLACES:  # a tree put into itself doubles
        return
    owner, key = places[steps.number(len(places))]
    kind = steps.number(8)
    if kind <= 3:
        owner[key] = copy.deepcopy(steps.choice(_STRANGERS))
    elif kind == 4:
        if owner is not tree:
            del owner[key]
    elif kind == 5:  # what stands elsewhere
        other, where = places[steps.number(len(places))]
        owner[key] = copy.deepcopy(other[where])
    elif kind == 6 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif kind == 6:
        # A key that stands twice in the text, once the mark is taken out of it.
        owner[f"{key}{_TWICE}"] = copy.deepcopy(steps.choice(_STRANGERS))
    elif isinstance(owner[key], int | float) and abs(owner[key]) < 1e300:
        owner[key] += steps.choice((1, -1, 0.5, 2**32))
    elif isinstance(owner[key], str):
        owner[key] += steps.choice(("x", "\n", "/", "0", "\0"))


def _places(node: Any) -> Any:
    """Where something stands: its owner, and the key or index there."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])
