"""The model card beside an exported file: what people, and catalogues of models, read about it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import yaml

import agrivision
from agrivision.evaluation.choosing import OBJECTIVES
from agrivision.inference.postprocessing import FILE as POSTPROCESSING
from agrivision.inference.postprocessing import chosen_for
from agrivision.inference.trained import Description, TrainedModel

_TASK = "image-segmentation"


def card(trained: TrainedModel, name: str, form: str, compared: str) -> str:
    """Markdown with a YAML head, as on the Hugging Face Hub.

    Args:
        trained: the original.
        name: of the exported file.
        form: of it.
        compared: a line that says how far it is from the original.
    """
    scores = trained.scores()
    head = yaml.safe_dump(_head(name, scores), sort_keys=False, allow_unicode=True)
    body = _body(trained, name, form, compared, scores)
    return f"---\n{head}---\n\n{body}\n"


def _head(name: str, scores: Mapping[str, float | None] | None) -> dict[str, Any]:
    head: dict[str, Any] = {
        "library_name": "agrivision",
        "pipeline_tag": _TASK,
        "tags": [_TASK, "semantic-segmentation", "remote-sensing", "agriculture", "unet"],
    }
    if scores is not None and scores["mIoU"] is not None:
        metrics = [
            {"type": "mean_iou" if key == "mIoU" else "iou", "name": _metric(key), "value": value}
            for key, value in scores.items()
            if value is not None
        ]
        result = {
            "task": {"type": _TASK},
            "dataset": {"name": "the run's own validation split", "type": "agrivision"},
            "metrics": metrics,
        }
        head["model-index"] = [{"name": name, "results": [result]}]
    return head


def _metric(key: str) -> str:
    return key if key == "mIoU" else f"IoU {key}"


def _body(
    trained: TrainedModel,
    name: str,
    form: str,
    compared: str,
    scores: Mapping[str, float | None] | None,
) -> str:
    description = trained.description
    parts = [
        f"# {name}",
        "Finds what is wrong with the crop in aerial imagery: a class for every pixel. Made by"
        f" agrivision after {trained.step} steps.",
        "## What goes in",
        f"Images of {len(description.bands)} bands in this order, pixels of the type"
        f" {description.dtype} as the sensor's product has them: what divides and shifts them is"
        f" {'in the file' if form != 'safetensors' else 'done on the way'}. Any number of images, of"
        f" any size; it was trained on tiles of {description.tile} x {description.tile} pixels.",
        *_fields(description, form),
        _bands(description),
        "## What comes out",
        "The probability of each class for each pixel, float32 (images, classes, height, width).",
        _classes(description, scores),
        _score(scores),
        *_after(trained),
        "## How to use it",
        _use(name, form, description),
        "## Where it comes from",
        _origin(trained, form, compared),
    ]
    return "\n\n".join(parts)


def _fields(description: Description, form: str) -> list[str]:
    """What a network that sees pixels relative to their field has to be told."""
    if description.scope != "field":
        return []
    channels = ", ".join((*description.bands, *description.indices))
    how = (
        "agrivision takes them from the scene or the data set."
        if form == "safetensors"
        else "They are its second input, float32 (images, 2, channels); `agrivision predict` takes them"
        " from the scene."
    )
    return [
        "It sees pixels relative to their field: to mean and deviation, over the field's pixels that"
        f" are not empty, of the channels {channels}. {how}"
    ]


def _bands(description: Description) -> str:
    rows = zip(
        description.bands,
        description.data_mean,
        description.data_std,
        description.mean,
        description.std,
        strict=True,
    )
    lines = [
        f"| {_cell(band)} | {' | '.join(f'{value:.6g}' for value in values)} |"
        for band, *values in rows
    ]
    empty = "" if description.nodata is None else f"\n\nNo data: {description.nodata:g} in all bands."
    head = "| band | mean | deviation | subtracted | divided by |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *lines]) + empty


def _classes(description: Description, scores: Mapping[str, float | None] | None) -> str:
    lines = ["| id | class | IoU |", "| --- | --- | --- |"]
    for number, name in enumerate(description.classes):
        lines.append(f"| {number} | {_cell(name)} | {_number((scores or {}).get(name))} |")
    return "\n".join(lines)


def _score(scores: Mapping[str, float | None] | None) -> str:
    if scores is None:
        return "It is not known how well it does: the run did not score this checkpoint."
    return f"mIoU {_number(scores['mIoU'])} on the validation split of its own data set."


def _after(trained: TrainedModel) -> list[str]:
    """What `tune` chose for these weights: the file holds the network alone."""
    chosen = chosen_for(trained)
    if chosen is None:
        return []
    expected = _number(chosen.crossed) + " is to be expected with it"
    return [
        f"Post-processing was chosen for these weights on the split {chosen.split}:"
        f" {_cell(chosen.how.line())}. It is not in this file: `predict --postprocess"
        f" {POSTPROCESSING}` takes the run's. The {OBJECTIVES[chosen.objective]} without it is"
        f" {_number(chosen.before)}, {expected}."
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _use(name: str, form: str, description: Description) -> str:
    shell = f"agrivision predict --checkpoint {name} scene.tif --out maps"
    image = f"image: (1, {len(description.bands)}, height, width) float32"
    arguments, keyword, inputs, torch_too = "image", "", '{"pixels": image}', ""
    if description.scope == "field":
        channels = len(description.bands) + len(description.indices)
        arguments, keyword = "image, field", ", statistics=torch.from_numpy(field)"
        inputs, torch_too = '{"pixels": image, "statistics": field}', "import torch\n\n"
        image += f", field: (1, 2, {channels}) float32"
    code = {
        "safetensors": (
            f"{torch_too}from agrivision.inference.exported import load_model\n\n"
            f'model = load_model("{name}")\n'
            f"probabilities = model.probabilities(image{keyword})  # {image}"
        ),
        "torch-export": (
            "import torch\n\n"
            f'network = torch.export.load("{name}").module()  # runs code in it: from those you trust\n'
            f"probabilities = network({arguments})  # {image}"
        ),
        "onnx": (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{name}")\n'
            f"(probabilities,) = session.run(None, {inputs})  # {image}"
        ),
    }[form]
    return f"```\n{shell}\n```\n\n```python\n{code}\n```"


def _origin(trained: TrainedModel, form: str, compared: str) -> str:
    model = trained.description.model
    network = (
        f"UNet, {model.depth} levels, {model.convolution} convolutions"
        if model.encoder is None
        else f"UNet with the timm encoder {model.encoder}"
    )
    network += ", residual" if model.block == "residual" else ""
    network += ", attention gates" if model.attention == "gate" else ""
    lines = {
        "network": f"{network}, {model.base_channels} channels at full resolution, norm {model.norm}",
        "weights": f"{_count(trained)} numbers, step {trained.step}",
        "data set": f"fingerprint `{trained.description.data_fingerprint}`",
        "form": f"{form}: {compared}",
        "versions": f"agrivision {agrivision.__version__}, torch {torch.__version__}, Python"
        f" {platform.python_version()}",
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items())


def _count(trained: TrainedModel) -> int:
    return sum(parameter.numel() for parameter in trained.module.parameters())
