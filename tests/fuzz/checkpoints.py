"""Checkpoints below their digests: what is loaded is what stands there, and only from their folder."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
import xxhash

from agrivision import checkpoint
from agrivision.checkpoint import MANIFEST
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import Program, mutate_bytes, mutate_json, mutate_tree

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


def _states() -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    return {
        "model": {"w": torch.randn(2, 3), "steps": torch.tensor(5), "half": torch.ones(3).bfloat16()},
        "progress": {"samples": 12, "best": None, "list": [1, 2.5, "x"]},
        "optimizer": {"m": torch.zeros(0, 4), "lr": 0.1},
    }


def _same(found: Any, states: Any) -> bool:
    if found.keys() != states.keys():
        return False
    for name, state in states.items():
        if found[name].keys() != state.keys():
            return False
        for key, value in state.items():
            other = found[name][key]
            if isinstance(value, torch.Tensor):
                alike = isinstance(other, torch.Tensor) and other.dtype == value.dtype
                if not alike or not torch.equal(other, value):
                    return False
            elif other != value:
                return False
    return True


def manifest(folder: Path) -> Target:
    """The manifest, with a digest that fits."""
    place, outside = (
        checkpoint.save(folder / "run", _states(), step=7, epoch=1),
        folder / "outside.json",
    )
    outside.write_text('{"stolen": 1}')
    (place / "link.json").symlink_to(outside)
    path = place / MANIFEST
    good = path.read_bytes()
    content = json.loads(good)
    about = {"bytes": outside.stat().st_size, "xxh3_128": _digest(outside)}
    escapes = [
        "../../outside.json",
        str(outside),
        "link.json",
        "model.pt",
        "./model.json",
        "model.json/",
    ]
    files = [{**content["files"], name: about} for name in escapes]
    seeds = [good, *(json.dumps(content | {"files": each}).encode() for each in files)]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = answer(lambda: checkpoint.load(place), place)
        assert found is REFUSED or _same(found.states, _states())
        path.write_bytes(_fitted(data))
        found = answer(lambda: checkpoint.load(place), place)
        if found is not REFUSED:
            assert type(found.step) is int and type(found.epoch) is int
            assert found.step >= 0 and found.epoch >= 0
            for name, state in found.states.items():
                assert state.items() or name in _states()
                assert _same({name: state}, {name: _states()[name]}) or _part_of(name, state)

    return Target(seeds=tuple(seeds), run=run, mutate=mutate_json)


def _part_of(name: str, state: dict[str, Any]) -> bool:
    """A state that has a file less than it was saved with is for its user to refuse."""
    whole = _states()[name]
    return state.keys() < whole.keys() and _same({name: state}, {name: {k: whole[k] for k in state}})


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _fitted(data: bytes) -> bytes:
    try:
        content = json.loads(data)
        content.pop("digest", None)
        text = json.dumps(content, sort_keys=True).encode()
        return json.dumps(content | {"digest": xxhash.xxh3_128_hexdigest(text)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def states(folder: Path) -> Target:
    """The files of a checkpoint; the first byte says which, the manifest fits."""
    place = checkpoint.save(folder / "run", _states(), step=7, epoch=1)
    good = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    about = json.loads(good.pop(MANIFEST))
    names = list(good)
    seeds = tuple(bytes([number]) + good[name] for number, name in enumerate(names))
    restored = folder / "copy"
    shutil.copytree(place, restored)

    def run(data: bytes) -> None:
        name, content = names[data[0] % len(names)] if data else names[0], data[1:]
        for other, whole in good.items():
            (restored / other).write_bytes(whole if other != name else content)
        (restored / MANIFEST).write_bytes((place / MANIFEST).read_bytes())
        found = answer(lambda: checkpoint.load(restored), restored / name)
        assert (found is REFUSED) == (content != good[name])
        file = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        fitting = json.dumps(about | {"files": {**about["files"], name: file}}).encode()
        (restored / MANIFEST).write_bytes(_fitted(fitting))
        found = answer(lambda: checkpoint.load(restored), restored / name)
        if found is not REFUSED:
            state = found.states[name.partition(".")[0]]
            _check(state, name, content)

    return Target(seeds=seeds, run=run, mutate=_mutate)


def _check(state: dict[str, Any], name: str, content: bytes) -> None:
    """As safetensors' own page describes it, by hand; or as JSON."""
    if name.endswith(".json"):
        expected = json.loads(content)
        values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        assert repr(values) == repr(expected) or expected.keys() != values.keys()
        return
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    data = content[8 + size :]
    for key, entry in header.items():
        tensor, (start, end) = state[key], entry["data_offsets"]
        assert tensor.dtype == _DTYPES[entry["dtype"]] and list(tensor.shape) == entry["shape"]
        assert math.prod(entry["shape"]) * tensor.element_size() == end - start <= len(data)
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data[start:end]


def _mutate(seeds: Any, program: bytes) -> bytes:
    """Bytes, or the header of a safetensors file as a tree, its length fitting."""
    steps = Program(program)
    if steps.number(2) == 0:
        return mutate_bytes(seeds, program[1:])
    seed = steps.choice(seeds)
    if seed[1:2] == b"{":
        return seed[:1] + mutate_tree(seed[1:], steps)
    (size,) = struct.unpack_from("<Q", seed, 1)
    header = mutate_tree(seed[9 : 9 + size], steps)
    return seed[:1] + struct.pack("<Q", len(header)) + header + seed[9 + size :]
