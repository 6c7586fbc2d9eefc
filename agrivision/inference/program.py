"""Exported graphs of torch (`.pt2`), read and run without torch's own loader.

`torch.export.load` unpickles what it does not know, evaluates the text of the sizes in a graph as
Python, looks names of operators up anywhere below `torch`, and loads compiled code that lies in the
archive: it is for files that one trusts. Here the graph's JSON is read as data. It may name the
operators of the table below, tensors of the archive and plain values, and it is run operator by
operator. Entries of the archive that are not needed, pickles among them, are never opened.
"""

from __future__ import annotations

import io
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from agrivision.inference.about import KEY
from agrivision.json_values import entries, flag, items, parse, shown, text, whole

_SCHEMA = 8  # major version of the graph's JSON, torch 2.5 and later
_MOST_JSON_BYTES = 256 << 20
_MOST_ENTRIES = 100_000
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_PAYLOAD = re.compile(r"(?:weight|tensor)_[0-9]+")

# What networks are made of. None of it opens a file, starts anything or writes beside its tensors.
_OPERATORS = frozenset(
    """
    abs adaptive_avg_pool2d add add_ addcmul addmm alias all amax amin arange argmax avg_pool2d
    batch_norm bitwise_not bmm cat celu chunk clamp clamp_ clamp_max clamp_min clone constant_pad_nd
    contiguous conv1d conv2d conv_transpose2d cos cumsum detach detach_ div div_ dropout dropout_
    einsum elu elu_ empty_like eq exp expand expand_as flatten floor floor_divide flip full full_like
    ge gelu gelu_ group_norm gt hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_
    index_select instance_norm isfinite layer_norm le leaky_relu leaky_relu_ lerp lift_fresh_copy
    linalg_vector_norm linear log_softmax logical_and logical_not logical_or lt masked_fill
    masked_fill_ matmul max_pool2d maximum mean minimum mish mish_ movedim mul mul_ nan_to_num
    nan_to_num_ narrow ne neg new_zeros ones ones_like pad permute pixel_shuffle pixel_unshuffle pow
    prelu reciprocal reflection_pad2d relu relu6 relu_ remainder repeat repeat_interleave
    replication_pad2d reshape rms_norm roll rsqrt rsub scaled_dot_product_attention select sigmoid
    sigmoid_ silu silu_ sin slice softmax softplus split split_with_sizes sqrt square squeeze stack
    sub sub_ sum sym_size tanh tanh_ tile to transpose type_as unbind unflatten unsqueeze
    upsample_bilinear2d upsample_nearest2d view where zeros zeros_like
    """.split()  # noqa: SIM905 - a table
)
_ON_SIZES: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos")
    },
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")
    },
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_not": operator.not_,
    "math.trunc": math.trunc,
}
# What tracing found on its way, said of tensors on the device where it ran.
_PASSED_OVER = re.compile(
    r"torch\.ops\.aten\.(?:_assert_\w+|sym_constrain_range\w*)\.\w+|torch\.sym_constrain_range\w*"
)
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    4: torch.preserve_format,
}


@dataclass(frozen=True)
class _Name:
    """Of a value that an earlier step has left."""

    name: str


class _Device:
    """Wherever the images are."""


@dataclass(frozen=True)
class _Step:
    """One operator's turn.

    Attributes:
        run: the operator.
        positional: its arguments: values, names of values, or lists of them.
        named: the same by keyword.
        outputs: names of what it gives; the one of a list, too.
        several: whether it gives several.
        last: names that no later step asks for.
    """

    run: Callable[..., Any]
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    outputs: tuple[str, ...]
    several: bool
    last: tuple[str, ...] = field(default=())


class Program(nn.Module):
    """An exported graph: pixels (B, bands, H, W) float32 → probabilities (B, classes, H, W).

    Args:
        steps: in their order.
        tensors: weights and constants by the names that the steps have for them.
        sources: name of the images, and that of the statistics of their fields where it takes them.
        result: name of the probabilities.
        digest: of the file, so that other graphs with the same weights have another state.

    Attributes:
        inputs: how many the graph takes.
    """

    def __init__(
        self,
        steps: tuple[_Step, ...],
        tensors: Mapping[str, Tensor],
        sources: tuple[str, ...],
        result: str,
        digest: bytes,
    ) -> None:
        super().__init__()
        self._steps, self._sources, self._result = steps, sources, result
        self.inputs = len(sources)
        self._places = {name: f"tensor_{place}" for place, name in enumerate(tensors)}
        for name, place in self._places.items():
            self.register_buffer(place, _laid_out(tensors[name]))
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def forward(self, pixels: Tensor, *statistics: Tensor) -> Tensor:
        """Run the graph.

        Args:
            pixels: (B, bands, H, W) float32, as in the data set.
            statistics: (B, 2, channels) float32, where the graph takes them.

        Raises:
            RuntimeError: the images do not fit it.
        """
        values: dict[str, Any] = {name: getattr(self, place) for name, place in self._places.items()}
        values.update(zip(self._sources, (pixels, *statistics), strict=True))
        for step in self._steps:
            named = {name: _filled(value, values, pixels) for name, value in step.named.items()}
            found = step.run(*(_filled(value, values, pixels) for value in step.positional), **named)
            given = found if step.several else (found,)
            values.update(zip(step.outputs, given, strict=True))
            for name in step.last:
                del values[name]
        result: Tensor = values[self._result]
        return result


def _laid_out(tensor: Tensor) -> Tensor:
    """Kernels in the memory order in which convolutions on a processor are fastest."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _filled(value: Any, values: Mapping[str, Any], pixels: Tensor) -> Any:
    if isinstance(value, _Name):
        return values[value.name]
    if isinstance(value, _Device):
        return pixels.device
    return [_filled(each, values, pixels) for each in value] if isinstance(value, list) else value


def read_program(content: bytes) -> tuple[str, Program]:
    """Read an archive of `torch.export.save`.

    Returns:
        What it says of itself, and the graph with its weights on the CPU.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile: it is damaged, or holds what
            is not read here: pickles, compiled code, operators that are not in the table.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root = _check_archive(archive)
        said = archive.read(f"{root}/extra/{KEY}.json").decode()
        program = entries(parse(_read_json(archive, f"{root}/models/model.json")))
        major = whole(entries(program["schema_version"])["major"])
        if major != _SCHEMA:
            raise ValueError(f"its graph has the format {major}; this program reads {_SCHEMA}")
        weights = dict(_payloads(archive, f"{root}/data/weights", "model_weights_config.json"))
        constants = dict(_payloads(archive, f"{root}/data/constants", "model_constants_config.json"))
    module = entries(program["graph_module"])
    tensors, sources = _inputs(entries(module["signature"]), weights, constants)
    graph = entries(module["graph"])
    result = _result(entries(module["signature"]))
    steps = _steps(items(graph["nodes"]), {*tensors, *sources}, result)
    return said, Program(steps, tensors, sources, result, xxhash.xxh3_128_digest(content))


def _check_archive(archive: zipfile.ZipFile) -> str:
    """The folder that all entries are in.

    Raises:
        ValueError: an entry is compressed, so that it may be any size, or is code.
    """
    found = archive.infolist()
    if not 0 < len(found) <= _MOST_ENTRIES:
        raise ValueError("it is no exported program")
    root = found[0].filename.partition("/")[0]
    for entry in found:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {entry.filename[:100]!r} is compressed")
        if entry.filename.startswith(f"{root}/data/aotinductor/"):
            raise ValueError("it holds compiled code, which is not loaded")
    return root


def _read_json(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > _MOST_JSON_BYTES:
        raise ValueError(f"{name} has more than {_MOST_JSON_BYTES} bytes")
    return archive.read(name)


def _payloads(archive: zipfile.ZipFile, folder: str, listed: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, from the plain bytes in which they lie.

    Raises:
        ValueError: one is pickled.
    """
    config = entries(entries(parse(_read_json(archive, f"{folder}/{listed}")))["config"])
    for name, payload in config.items():
        file, meta = text(payload["path_name"]), payload["tensor_meta"]
        if flag(payload["use_pickle"]) or not _PAYLOAD.fullmatch(file) or meta is None:
            raise ValueError(f"{shown(name)} is pickled, which is not loaded")
        yield name, _tensor(archive.read(f"{folder}/{file}"), entries(meta))


def _tensor(content: bytes, meta: dict[str, Any]) -> Tensor:
    dtype = _DTYPES[whole(meta["dtype"])]
    sizes, strides = ([whole(size["as_int"]) for size in items(meta[k])] for k in ("sizes", "strides"))
    if not content:
        return torch.empty(0, dtype=dtype).reshape(sizes)
    if math.prod(sizes) * dtype.itemsize > len(content):  # a stride of zero makes much of little
        raise ValueError(f"a tensor of {sizes} in {len(content)} bytes")
    flat = torch.frombuffer(bytearray(content), dtype=dtype)
    start = whole(meta["storage_offset"]["as_int"])
    # Torch itself refuses to look beyond the bytes that there are.
    return flat.as_strided(sizes, strides, start).clone()


def _inputs(
    signature: dict[str, Any], weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights and constants by their names in the graph, and the names of what it is given."""
    tensors: dict[str, Tensor] = {}
    given: list[str] = []
    for spec in items(signature["input_specs"]):
        ((kind, about),) = entries(spec).items()
        if kind == "user_input":
            given.append(text(about["arg"]["as_tensor"]["name"]))
        elif kind == "parameter":
            tensors[text(about["arg"]["name"])] = weights[about["parameter_name"]]
        elif kind == "buffer":
            kept = weights if flag(about["persistent"]) else constants
            tensors[text(about["arg"]["name"])] = kept[about["buffer_name"]]
        elif kind == "tensor_constant":
            tensors[text(about["arg"]["name"])] = constants[about["tensor_constant_name"]]
        else:
            raise ValueError(f"its graph takes a {shown(kind)}, which is not loaded")
    if len(given) not in (1, 2):
        raise ValueError(f"its graph takes {len(given)} inputs, not images and what their fields are")
    return tensors, tuple(given)


def _result(signature: dict[str, Any]) -> str:
    results = items(signature["output_specs"])
    if len(results) != 1 or "user_output" not in entries(results[0]):
        raise ValueError("its graph gives other things than probabilities")
    return text(results[0]["user_output"]["arg"]["as_tensor"]["name"])


def _steps(nodes: list[Any], known: set[str], result: str) -> tuple[_Step, ...]:
    """The graph's steps; each asks only for what stands before it.

    Raises:
        ValueError: one does not, or is no operator of the table.
    """
    steps: list[_Step] = []
    known = set(known)
    for node in map(entries, nodes):
        if _PASSED_OVER.fullmatch(text(node["target"])):
            continue
        step = _step(node)
        missing = [name for name in _asked(step) if name not in known]
        if missing:
            raise ValueError(f"its graph asks for {shown(missing[0])} before it is there")
        known.update(step.outputs)
        steps.append(step)
    if result not in known:
        raise ValueError("its graph does not give what it says")
    return _freeing(steps, result)


def _step(node: dict[str, Any]) -> _Step:
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in map(entries, items(node["inputs"])):
        value = _value(entries(argument["arg"]))
        if argument.get("kind") == 2:  # by keyword
            named[text(argument["name"])] = value
        else:
            positional.append(value)
    given = items(node["outputs"])
    listed = [each["as_tensors"] for each in given if "as_tensors" in entries(each)]
    names = [_output(entries(each)) for each in (listed[0] if listed else given)]
    several = bool(listed) or len(given) > 1
    return _Step(_operator(node["target"]), tuple(positional), named, tuple(names), several)


def _output(output: dict[str, Any]) -> str:
    if "name" in output:  # in a list
        return text(output["name"])
    ((kind, about),) = output.items()
    if kind not in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float"):
        raise ValueError(f"a step gives {shown(kind)}, which is not known")
    return text(about["name"] if kind == "as_tensor" else about["as_name"])


def _operator(target: str) -> Callable[..., Any]:
    if target in _ON_SIZES:
        return _ON_SIZES[target]
    match = _ATEN.fullmatch(target)
    if match is None or match[1] not in _OPERATORS:
        raise ValueError(f"its graph asks for {shown(target)}, which is not among the known operators")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, match[1]), match[2])
    return found


def _value(argument: dict[str, Any]) -> Any:
    """A value of the graph's JSON as the operators take it."""
    ((kind, value),) = argument.items()
    if kind in _READERS:
        return _READERS[kind](value)
    raise ValueError(f"an operator is given {shown(kind)}, which is not known")


def _name(value: Any) -> Any:
    """Of a value, or the value itself: `{"as_name": "n"}`, `{"as_int": 3}`, `{"as_none": true}`."""
    ((kind, about),) = entries(value).items()
    if kind == "as_name":
        return _Name(text(about))
    return _Name(text(about["name"])) if kind == "as_tensor" else _value({kind: about})


def _tensor_name(value: Any) -> _Name:
    return _Name(text(entries(value)["name"]))


def _whole(value: Any) -> int:
    return whole(value, -(2**63))


def _float(value: Any) -> float:
    return float(value)  # infinite ones are written as text


def _list(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda value: [read(each) for each in items(value)]


_READERS: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_tensor": _tensor_name,
    "as_tensors": _list(_tensor_name),
    "as_optional_tensor": _name,
    "as_optional_tensors": _list(_name),
    "as_int": _whole,
    "as_ints": _list(_whole),
    "as_float": _float,
    "as_floats": _list(_float),
    "as_bool": flag,
    "as_bools": _list(flag),
    "as_string": text,
    "as_sym_int": _name,
    "as_sym_ints": _list(_name),
    "as_sym_float": _name,
    "as_sym_floats": _list(_name),
    "as_sym_bool": _name,
    "as_sym_bools": _list(_name),
    "as_scalar_type": lambda value: _DTYPES[whole(value)],
    "as_layout": lambda value: _LAYOUTS[whole(value)],
    "as_memory_format": lambda value: _MEMORY_FORMATS[whole(value)],
    "as_device": lambda _: _Device(),
}


def _asked(step: _Step) -> Iterator[str]:
    """The names that a step's arguments have."""
    waiting = [*step.positional, *step.named.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _Name):
            yield value.name
        elif isinstance(value, list):
            waiting.extend(value)


def _freeing(steps: list[_Step], result: str) -> tuple[_Step, ...]:
    """The same steps, each with the names that can be forgotten after it: memory is what runs out."""
    needed = {result}
    found: list[_Step] = []
    for step in reversed(steps):
        names = {*_asked(step), *step.outputs}
        last = tuple(sorted(names - needed))
        needed |= names
        found.append(_Step(step.run, step.positional, step.named, step.outputs, step.several, last))
    return tuple(reversed(found))
