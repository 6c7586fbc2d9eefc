"""Exported networks: what they say of themselves, and graphs that say anything."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from agrivision.config import ModelConfig
from agrivision.inference.about import KEY, About
from agrivision.inference.export import Samples, export
from agrivision.inference.exported import load_model
from agrivision.inference.trained import Description, TrainedModel
from agrivision.model.build import build_model
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import mutate_json

_GRAPH = "models/model.json"
_MARK = "\0piece\0"


def _network(**model: str) -> TrainedModel:
    config = ModelConfig(base_channels=1, depth=1, norm="none", **model)  # type: ignore[arg-type]
    description = Description(
        model=config,
        bands=("red", "nir"),
        classes=("a", "b"),
        class_values=(),
        dtype="uint8",
        tile=16,
        mean=(0.0, 1.0),
        std=(1.0, 2.0),
        nodata=None,
        data_fingerprint="",
    )
    torch.manual_seed(0)
    module = build_model(config, 2, 2).eval()
    return TrainedModel(module, description, torch.device("cpu"), 7, Path("run"))


def weights(folder: Path) -> Target:
    """What stands in a safetensors file about its weights."""
    path = folder / "network.safetensors"
    known = [_network(), _network(up="bilinear", block="residual")]
    tensors = [dict(trained.module.state_dict()) for trained in known]
    seeds = tuple(About.of(trained).to_text().encode() for trained in known)

    def run(data: bytes) -> None:
        for content in tensors:
            said = data.decode(errors="replace")
            path.write_bytes(safetensors.torch.save(content, {KEY: said}))
            found = answer(lambda: load_model(path, "cpu"), path)
            if found is not REFUSED:
                about = json.loads(said)
                assert found.step == about["step"]
                assert found.description == Description.from_dict(about["description"])
                assert all(
                    torch.equal(found.module.state_dict()[name], content[name]) for name in content
                )

    return Target(seeds=seeds, run=run, mutate=mutate_json)


def graph(folder: Path) -> Target:
    """The graph in a .pt2 file: one of its steps at a time, or what it says of inputs and outputs."""
    path = folder / "network.pt2"
    samples = Samples(batches=(np.zeros((1, 2, 16, 16), np.uint8),), origin="nothing")
    export(_network(up="bilinear"), path, "torch-export", samples)
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (each for each in files if each.endswith(_GRAPH))
    content = json.loads(files[name])
    module = content["graph_module"]
    pieces = [*module["graph"]["nodes"], module["signature"]]  # in the order in which they stand there
    for node in pieces[:-1]:
        node["metadata"] = {}  # where each step came from: most of the text, and not looked at
    seeds = tuple(f"{place}\n{json.dumps(piece)}".encode() for place, piece in enumerate(pieces))
    # The rest is written once, with a mark where each piece belongs.
    module["signature"] = _MARK
    module["graph"]["nodes"] = [_MARK] * (len(pieces) - 1)
    frame = json.dumps(content).encode().split(json.dumps(_MARK).encode())
    assert frame[0].endswith(b'"nodes": [') and frame[-2].endswith(b'"signature": ')

    def run(data: bytes) -> None:
        changed = data.partition(b"\n")
        texts = [seed.partition(b"\n") for seed in seeds]
        filled = [changed[2] if each[0] == changed[0] else each[2] for each in texts]
        whole = b"".join(piece for pair in zip(frame, [*filled, b""], strict=True) for piece in pair)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for each, kept in files.items():
                archive.writestr(each, whole if each == name else kept)
        path.write_bytes(packed.getvalue())
        found = answer(lambda: load_model(path, "cpu"), path)
        assert found is REFUSED or isinstance(found, TrainedModel)

    def mutate(given: Sequence[bytes], program: bytes) -> bytes:
        place, _, text = given[program[0] % len(given) if program else 0].partition(b"\n")
        return place + b"\n" + mutate_json((text,), program[1:])

    return Target(seeds=seeds, run=run, mutate=mutate)
