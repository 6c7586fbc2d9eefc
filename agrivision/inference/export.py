"""A trained network → one file that can predict, compared with the original before it gets its name."""

from __future__ import annotations

import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from agrivision import checkpoint
from agrivision.data.loader import evaluation_batches
from agrivision.data.normalise import Normaliser
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import AgrivisionError, BadInput, CheckpointError, Unfaithful
from agrivision.inference.about import KEY, About
from agrivision.inference.card import card
from agrivision.inference.exported import SUFFIXES, Form, load_exported
from agrivision.inference.onnx_network import need
from agrivision.inference.scoring import check_fit
from agrivision.inference.trained import Description, TrainedModel
from agrivision.model.padding import dense_logits
from agrivision.reading import read_plain
from agrivision.rundir import RunDirectory
from agrivision.storage import replacing, storage_error, write_atomically
from agrivision.world import World

BOUND = 1e-3  # of a probability: kernels add in another order, and nothing else may differ
_MOST_CONFIG = 1 << 16  # bytes
_MOST_ONNX_BYTES = (1 << 31) - 1  # protobuf's
_CUT = (3, 5)  # rows and columns that are left out of a batch, so that no network halves its sides

Images = NDArray[Any]


class Pipeline(nn.Module):
    """All of the way from pixels to probabilities: what a graph is exported of.

    Args:
        network: as in training.
        normaliser: that stands before it.
    """

    def __init__(self, network: nn.Module, normaliser: Normaliser) -> None:
        super().__init__()
        self.network, self._normaliser = network, normaliser

    def forward(self, pixels: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Probabilities (B, classes, H, W) of pixels (B, bands, H, W) float32 as in the data set.

        What is relative to the images' fields needs their statistics, (B, 2, channels) float32.
        """
        normal = self._normaliser(pixels, statistics=statistics)
        return dense_logits(self.network, normal).float().softmax(1)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images that the exported form is compared on.

    Attributes:
        batches: each (batch, bands, height, width), pixels as in the data set.
        origin: where they come from, in words.
    """

    batches: tuple[Images, ...]
    origin: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the exported form is from the original.

    Attributes:
        pixels: that were compared.
        difference: largest absolute difference of a probability.
        changed: share of the pixels that get another class, 0 to 1.
        origin: of the images, in words.
    """

    pixels: int
    difference: float
    changed: float
    origin: str

    def line(self) -> str:
        """For people."""
        return (
            f"compared on {self.pixels} pixels of {self.origin}: the largest difference of a"
            f" probability is {self.difference:.2g}, {100 * self.changed:.4g} % of the pixels get"
            " another class"
        )


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What `export` wrote.

    Attributes:
        out: the file.
        card: what people read about it.
        bytes: size of the file.
        comparison: with the original.
    """

    out: Path
    card: Path
    bytes: int
    comparison: Comparison

    def lines(self) -> list[str]:
        """For people."""
        return [self.comparison.line(), f"{self.out}: {self.bytes} bytes, described in {self.card}"]


def export(trained: TrainedModel, out: Path, form: Form, samples: Samples) -> ExportSummary:
    """Write a network in another form, and a model card beside it.

    Args:
        trained: loaded from a run, a checkpoint or an exported safetensors file.
        out: file to write; its suffix goes with the form. `OUT.md` becomes the card.
        form: `safetensors` holds the weights and their description; `torch-export` and `onnx` hold a
            graph from pixels to probabilities, for any number of images of any size; a network that
            sees pixels relative to their field takes the statistics of that as a second input.
        samples: to compare on.

    Raises:
        BadInput: the network cannot be exported in this form, or a package is missing.
        Unfaithful: what was written gives something else than the original; there is no file then.
        StorageError, NotWritable: the disk refused.
    """
    _check(trained, out, form)
    content = _WRITERS[form](trained)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out.parent, error) from error
    with replacing(out) as file:
        file.write(content)
        file.flush()
        again = _read_back(Path(file.name), form, trained)
        comparison = compare(trained, again, samples)
        if not comparison.difference <= BOUND:  # which NaN is not, either
            raise Unfaithful(f"{out} is not written, its bound is {BOUND:g}: {comparison.line()}")
    about = out.with_name(out.name + ".md")
    write_atomically(about, card(trained, out.name, form, comparison.line()).encode())
    return ExportSummary(out=out, card=about, bytes=len(content), comparison=comparison)


def _check(trained: TrainedModel, out: Path, form: Form) -> None:
    if trained.takes_pixels:
        raise BadInput(f"{trained.folder} is exported already: export from the run's checkpoint")
    if out.suffix != SUFFIXES[form]:
        raise BadInput(f"{out} does not end in {SUFFIXES[form]}, by which {form} is known")
    if (out.parent / checkpoint.MANIFEST).is_file():
        raise BadInput(f"{out.parent} is a checkpoint: choose another folder with --out")
    if form == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            need(name)


def _read_back(beside: Path, form: Form, trained: TrainedModel) -> TrainedModel:
    """What was written, as `predict` will load it.

    Raises:
        BadInput: the network needs something that is not loaded.
    """
    try:
        return load_exported(beside, form, trained.device)
    except CheckpointError as error:
        raise BadInput(
            f"this network cannot be exported as {form} ({error}): safetensors takes any"
        ) from None


@torch.inference_mode()
def compare(original: TrainedModel, other: TrainedModel, samples: Samples) -> Comparison:
    """Predict the same images with both."""
    difference, changed, pixels = torch.zeros(()), 0, 0
    for images in samples.batches:
        wanted, found = original.probabilities(images).cpu(), other.probabilities(images).cpu()
        # A maximum that NaN takes part in is NaN.
        difference = torch.maximum(difference, (wanted - found).abs().max())
        changed += int((wanted.argmax(1) != found.argmax(1)).sum())
        pixels += wanted[:, 0].numel()
    return Comparison(
        pixels=pixels,
        difference=float(difference),
        changed=changed / pixels,
        origin=samples.origin,
    )


def find_samples(trained: TrainedModel, data: Path | None, split: str | None, tiles: int) -> Samples:
    """Images to compare on: of a data set, the run's own where none is given, else made up.

    Args:
        trained: the original.
        data: a prepared data set.
        split: of it; None takes `val`, or of the run's own data set the split that it is scored on.
        tiles: how many to take.

    Raises:
        BadInput: fewer than one tile is wanted, or the data set has other bands or classes.
        DatasetError: it cannot be read.
    """
    if tiles < 1:
        raise BadInput(f"tiles is {tiles}: it must be at least 1")
    if data is not None:
        return _of_dataset(trained, data, split or "val", tiles)
    own = _own_data(trained.folder)
    if own is not None:
        try:
            return _of_dataset(trained, own[0], split or own[1], tiles)
        except AgrivisionError as error:
            logging.getLogger(__name__).warning("the run's own data set is not used: %s", error)
    return _made_up(trained.description, tiles)


def _own_data(folder: Path) -> tuple[Path, str] | None:
    """The data set that a checkpoint's run names, and the split that it is scored on."""
    try:
        content = yaml.safe_load(read_plain(RunDirectory(folder.parent.parent).config, _MOST_CONFIG))
        path, split = content["data"]["path"], content["data"].get("val_split", "val")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(path, str) or not isinstance(split, str) or not Path(path).is_dir():
        return None
    return Path(path), split


def _of_dataset(trained: TrainedModel, data: Path, split: str, tiles: int) -> Samples:
    schema = Schema.read(data)
    schema.split(split)
    check_fit(trained, schema, data)
    reader = SplitReader(data, schema, split)
    images: list[Images] = []
    with closing(evaluation_batches(reader, World(), batch_size=1, threads=0)) as batches:
        for batch in batches:
            images.append(batch.pixels.images().numpy().copy())
            if len(images) == tiles:
                break
    return Samples(
        batches=_batches(images), origin=f"{len(images)} tiles of {data} ({split}), whole and cut"
    )


def _made_up(description: Description, tiles: int) -> Samples:
    """Blotches with the mean and the deviation of the training's bands."""
    generator = np.random.default_rng(0)
    side = min(description.tile, 256)
    dtype = np.dtype(description.dtype)
    images: list[Images] = []
    for _ in range(tiles):
        coarse = generator.standard_normal((len(description.bands), -(-side // 8), -(-side // 8)))
        blotches = coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]
        mean, std = (np.array(v)[:, None, None] for v in (description.data_mean, description.data_std))
        pixels = mean + std * blotches
        if np.issubdtype(dtype, np.integer):
            pixels = np.rint(pixels).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        images.append(np.ascontiguousarray(pixels, dtype)[None])
    origin = f"{tiles} tiles made up within the training's statistics (give real ones with --data)"
    return Samples(batches=_batches(images), origin=origin)


def _batches(images: Sequence[Images]) -> tuple[Images, ...]:
    """Each image alone, and some together without a few rows and columns."""
    rows, columns = _CUT
    height, width = images[0].shape[-2:]
    cut = np.concatenate(images[:3])[..., : max(1, height - rows), : max(1, width - columns)]
    return (*images, np.ascontiguousarray(cut))


def _to_safetensors(trained: TrainedModel) -> bytes:
    weights = {name: tensor.cpu().contiguous() for name, tensor in trained.module.state_dict().items()}
    return safetensors.torch.save(weights, {"format": "pt", KEY: About.of(trained).to_text()})


def _to_program(trained: TrainedModel) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(_traced(trained), buffer, extra_files={f"{KEY}.json": _said(trained)})
    return buffer.getvalue()


def _to_onnx(trained: TrainedModel) -> bytes:
    onnx = need("onnx")
    program = _traced(trained)
    with _quiet(), _refusals("ONNX"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["pixels", "statistics"][: len(program.graph_signature.user_inputs)],
            output_names=["probabilities"],
            custom_translation_table={
                torch.ops.aten.remainder.Scalar: _remainder,
                operator.floordiv: _floor_division,
            },
        )
        assert exported is not None
        model = exported.model_proto
        if model.ByteSize() > _MOST_ONNX_BYTES:
            raise ValueError("it takes more than 2 GB")
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        sides = () if value.name == "statistics" else ((2, "height"), (3, "width"))
        for place, name in ((0, "batch"), *sides):
            shape.dim[place].dim_param = name
    del model.graph.value_info[:]  # notes of the tracing, with its own names of the sizes
    onnx.helper.set_model_props(model, {KEY: _said(trained)})
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _remainder(numbers: Any, divisor: Any) -> Any:
    """`numbers % divisor` in ONNX; onnxscript's own takes no divisor that depends on the images."""
    operators: Any = need("onnxscript").opset18
    return operators.Mod(numbers, operators.CastLike(divisor, numbers))


def _floor_division(number: Any, divisor: Any) -> Any:
    """`number // divisor` in ONNX, whose own division of whole numbers rounds towards zero."""
    operators: Any = need("onnxscript").opset18
    return operators.Div(operators.Sub(number, operators.Mod(number, divisor)), divisor)


def _said(trained: TrainedModel) -> str:
    return About.of(trained).to_text()


_WRITERS: dict[Form, Callable[[TrainedModel], bytes]] = {
    "safetensors": _to_safetensors,
    "torch-export": _to_program,
    "onnx": _to_onnx,
}


def _traced(trained: TrainedModel) -> ExportedProgram:
    """The graph from pixels to probabilities, for images of any number and size.

    Raises:
        BadInput: torch cannot trace the network.
    """
    network: Any = copy.deepcopy(trained.module).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    pipeline = Pipeline(network, trained.description.normaliser).eval().requires_grad_(False)
    unit = network.input_size(1)
    # Sides that differ and that the network does not halve: whatever holds of them alone is no rule.
    images = torch.zeros(2, len(trained.description.bands), 2 * unit + 5, 2 * unit + 7)
    given: tuple[Tensor, ...] = (images,)
    sizes: dict[str, Any] = {"pixels": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    if trained.description.scope == "field":
        given = images, trained.description.normaliser.statistics(images)
        sizes["statistics"] = {0: Dim.DYNAMIC}
    with _quiet(), _refusals("torch.export"), torch.no_grad():
        program = torch.export.export(pipeline, given, dynamic_shapes=sizes)
    return _of_any_size(program)


def _of_any_size(program: ExportedProgram) -> ExportedProgram:
    """The same without what tracing concluded from the sizes of its example.

    It notes, for example, that an image of 37 rows is not one of 40, since the one is padded and the
    other need not be. The graph pads in either case, by nothing where nothing is missing.
    """
    program._guards_code = []
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, int_oo)
    return program


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what tracing may end in, which is anything, into one line.

    Raises:
        BadInput: instead.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise BadInput(f"{what} cannot take this network ({reason}): safetensors takes any") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch says of its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
