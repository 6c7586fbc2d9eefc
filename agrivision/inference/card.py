"""The model card beside an exported file: what people, and catalogues of models, read about it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import yaml

import agrivision
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
        _bands(description),
        "## What comes out",
        "The probability of each class for each pixel, float32 (images, classes, height, width).",
        _classes(description, scores),
        _score(scores),
        "## How to use it",
        _use(name, form, description),
        "## Where it comes from",
        _origin(trained, form, compared),
    ]
    return "\n\n".join(parts)


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _use(name: str, form: str, description: Description) -> str:
    shell = f"agrivision predict --checkpoint {name} scene.tif --out maps"
    image = f"image: (1, {len(description.bands)}, height, width) float32"
    code = {
        "safetensors": (
            "from agrivision.inference.exported import load_model\n\n"
            f'model = load_model("{name}")\n'
            f"probabilities = model.probabilities(image)  # {image}"
        ),
        "torch-export": (
            "import torch\n\n"
            f'network = torch.export.load("{name}").module()  # runs code in it: from those you trust\n'
            f"probabilities = network(image)  # {image}"
        ),
        "onnx": (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{name}")\n'
            f'(probabilities,) = session.run(None, {{"pixels": image}})  # {image}'
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
