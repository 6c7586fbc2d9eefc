"""Loading what can predict: a run, a checkpoint, or a network that was exported into one file.

Whatever the form, the result is a `TrainedModel`. An exported file may come from anybody: nothing in it
is unpickled, no code in it is run, and it leads to no other file.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError

from agrivision import checkpoint
from agrivision.errors import CheckpointError
from agrivision.inference.about import KEY, About
from agrivision.inference.onnx_network import OnnxNetwork, read_onnx
from agrivision.inference.program import Program, read_program
from agrivision.inference.trained import TrainedModel, load_run, with_weights
from agrivision.json_values import entries, parse, text
from agrivision.reading import read_plain

Form = Literal["safetensors", "torch-export", "onnx"]
SUFFIXES: dict[Form, str] = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}

_MOST_BYTES = 8 << 30  # of a file: read as a whole
_HEADER = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library
_TRIAL = (1, 5, 7)  # images, rows and columns: sizes that no network halves
# What reading a damaged or foreign file may end in, beside errors of our own.
_REFUSALS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    zipfile.BadZipFile,
    SafetensorError,
)


def load_model(path: str | Path, device: str | torch.device | None = None) -> TrainedModel:
    """Load a trained network in whatever form it is.

    Args:
        path: a run directory, a checkpoint or a file in one, see `find_checkpoint`; or a file that
            `agrivision export` wrote.
        device: where to; None takes the GPU where there is one.

    Raises:
        CheckpointError: there is none, or it is damaged, or not what it says it is.
        BadInput: it needs a package that is not installed.
    """
    path = Path(path)
    form = _form(path)
    return load_run(path, device) if form is None else load_exported(path, form, device)


def _form(path: Path) -> Form | None:
    """The form of an exported file; None for what is no such file."""
    if path.is_dir() or not path.exists() or (path.parent / checkpoint.MANIFEST).is_file():
        return None
    return next((form for form, suffix in SUFFIXES.items() if path.suffix == suffix), None)


def load_exported(path: Path, form: Form, device: str | torch.device | None = None) -> TrainedModel:
    """Load an exported file whose form is known; its name does not matter.

    Raises:
        CheckpointError: it is damaged, or not what it says it is.
        BadInput: it needs a package that is not installed.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        content = read_plain(path, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    try:
        trained = _READERS[form](path, content, chosen)
        _try_out(trained)
    except _REFUSALS as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot use {path}: {reason or type(error).__name__}") from None
    return trained


def _read_safetensors(path: Path, content: bytes, device: torch.device) -> TrainedModel:
    about = About.from_text(_metadata(content))
    weights = safetensors.torch.load(content)
    module = with_weights(about.description, weights, device)
    return TrainedModel(module, about.description, device, about.step, path)


def _metadata(content: bytes) -> str:
    """Our entry in a safetensors file.

    Raises:
        ValueError: there is none.
    """
    if len(content) < _HEADER.size:
        raise ValueError("it is no safetensors file")
    (size,) = _HEADER.unpack_from(content)
    if size > min(_MOST_HEADER_BYTES, len(content) - _HEADER.size):
        raise ValueError("it is no safetensors file")
    header = entries(parse(content[_HEADER.size : _HEADER.size + size]))
    metadata = entries(header.get("__metadata__", {}))
    if KEY not in metadata:
        raise ValueError("it was not written by `agrivision export`: give the checkpoint's folder")
    return text(metadata[KEY])


def _read_program(path: Path, content: bytes, device: torch.device) -> TrainedModel:
    said, program = read_program(content)
    return _taking_pixels(path, said, program.to(device), device)


def _read_onnx(path: Path, content: bytes, device: torch.device) -> TrainedModel:
    said, network = read_onnx(content, device)
    return _taking_pixels(path, said, network.to(device), device)


def _taking_pixels(
    path: Path, said: str, module: Program | OnnxNetwork, device: torch.device
) -> TrainedModel:
    about = About.from_text(said)
    inputs = 2 if about.description.scope == "field" else 1
    if module.inputs != inputs:
        raise ValueError(f"its graph takes {module.inputs} inputs, its description says {inputs}")
    return TrainedModel(module.eval(), about.description, device, about.step, path, takes_pixels=True)


_READERS: dict[Form, Callable[[Path, bytes, torch.device], TrainedModel]] = {
    "safetensors": _read_safetensors,
    "torch-export": _read_program,
    "onnx": _read_onnx,
}


def _try_out(trained: TrainedModel) -> None:
    """See in a small image that probabilities come out.

    Raises:
        ValueError: something else does.
    """
    batch, rows, columns = _TRIAL
    bands, classes = len(trained.description.bands), len(trained.description.classes)
    found = trained.probabilities(torch.zeros(batch, bands, rows, columns))
    if found.dtype != torch.float32 or found.shape != (batch, classes, rows, columns):
        raise ValueError(
            f"images of {bands} bands become {json.dumps(list(found.shape))} {found.dtype}, not the"
            f" probabilities of {classes} classes"
        )
