"""ONNX files: read, checked, and run by onnxruntime, the optional extra `onnx`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from agrivision.errors import BadInput
from agrivision.inference.about import KEY

_QUIET = 4  # onnxruntime's severity above which it writes to stderr: what is wrong comes as an error
_STANDARD = ("", "ai.onnx")  # domains of operators


class OnnxNetwork(nn.Module):
    """An ONNX graph: pixels (B, bands, H, W) float32 → probabilities (B, classes, H, W).

    Args:
        session: of onnxruntime.
        digest: of the file: the module's only state.

    Attributes:
        inputs: how many the graph takes: with two, the statistics of the images' fields are the second.
    """

    def __init__(self, session: Any, digest: bytes) -> None:
        super().__init__()
        self._session = session
        self._names: list[str] = [each.name for each in session.get_inputs()]
        self.inputs = len(self._names)
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def forward(self, pixels: Tensor, *statistics: Tensor) -> Tensor:
        """Run the graph.

        Args:
            pixels: (B, bands, H, W) float32, as in the data set.
            statistics: (B, 2, channels) float32, where the graph takes them.

        Raises:
            BadInput: it is to be run in another precision than it was exported in.
            RuntimeError: onnxruntime refused.
        """
        if torch.is_autocast_enabled(pixels.device.type):
            raise BadInput("an ONNX file computes as it was exported: leave out --precision bf16")
        given = [each.detach().cpu().contiguous().numpy() for each in (pixels, *statistics)]
        try:
            (found,) = self._session.run(None, dict(zip(self._names, given, strict=True)))
        except Exception as error:  # onnxruntime's have no common base of their own
            raise RuntimeError(f"onnxruntime: {error}") from None
        return torch.from_numpy(found).to(pixels.device)


def read_onnx(content: bytes, device: torch.device) -> tuple[str, OnnxNetwork]:
    """Read an ONNX file.

    Args:
        content: of the file.
        device: where to run it; a GPU where onnxruntime was built for it.

    Returns:
        What it says of itself, and the network.

    Raises:
        BadInput: a package is missing.
        ValueError: it is damaged, or leads to other files, or needs more than standard operators.
    """
    onnx, runtime = need("onnx"), need("onnxruntime")
    try:
        model = onnx.load_model_from_string(content)
        _check(onnx, model)
        onnx.checker.check_model(model)
    except ValueError:
        raise
    except Exception as error:  # of protobuf or of the checker, which have no common base
        raise ValueError(f"it is no ONNX file: {error}") from None
    said = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in said:
        raise ValueError("it was not written by `agrivision export`")
    options = runtime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(content, options, providers=_providers(runtime, device))
    except Exception as error:
        raise ValueError(f"onnxruntime does not take it: {error}") from None
    if len(session.get_inputs()) not in (1, 2) or len(session.get_outputs()) != 1:
        raise ValueError("its graph takes or gives other things than images and probabilities")
    return said[KEY], OnnxNetwork(session, xxhash.xxh3_128_digest(content))


def need(name: str) -> ModuleType:
    """An optional package.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"ONNX needs {name} ({error}): pip install 'agrivision[onnx]'") from None


def _providers(runtime: ModuleType, device: torch.device) -> list[str]:
    here = runtime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    return [name for name in wanted if name in here] + ["CPUExecutionProvider"]


def _check(onnx: ModuleType, model: Any) -> None:
    """Refuse weights in other files and operators that a library would have to bring.

    Raises:
        ValueError: there are such ones.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in functions:
            raise ValueError(f"it needs operators of {node.domain[:100]!r}, which are not loaded")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError("its weights lie in another file, which is not loaded")


def _nodes(model: Any) -> Iterator[Any]:
    """All nodes, those of functions and of graphs in graphs included."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _graphs(model: Any) -> Iterator[Any]:
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.g, *attribute.graphs)


def _tensors(model: Any) -> Iterator[Any]:
    """All tensors that the file holds or names."""
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
