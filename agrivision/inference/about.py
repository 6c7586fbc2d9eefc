"""What an exported file says of itself: the description of its network, in the file's own metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import agrivision
from agrivision.data.labels import MAX_CLASSES
from agrivision.data.schema import DTYPES, MAX_TILE
from agrivision.errors import AgrivisionError
from agrivision.inference.trained import Description, TrainedModel
from agrivision.json_values import entries, label, number, parse, shown, whole

KEY = "agrivision"  # of the entry in a file's metadata
_FORMAT = "agrivision-export"
_VERSION = 1
_WIDEST = 1 << 14  # channels


@dataclass(frozen=True, kw_only=True)
class About:
    """What is needed to predict, beside the network.

    Attributes:
        description: bands, classes, statistics.
        step: optimiser steps that the network was trained for.
    """

    description: Description
    step: int

    @classmethod
    def of(cls, trained: TrainedModel) -> About:
        """Of a network that is exported."""
        return cls(description=trained.description, step=trained.step)

    def to_text(self) -> str:
        """As JSON."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "agrivision": agrivision.__version__,
            "step": self.step,
            "description": self.description.to_dict(),
        }
        return json.dumps(content)

    @classmethod
    def from_text(cls, text: str) -> About:
        """From JSON of somebody else.

        Raises:
            ValueError: it is none, of another version, or holds what no description does.
        """
        content = entries(parse(text))
        if content.get("format") != _FORMAT:
            raise ValueError("it was not written by `agrivision export`")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"its format has the version {content.get('version')!r}; this program reads {_VERSION}"
            )
        try:
            description = Description.from_dict(entries(content["description"]))
            _check(description)
            return cls(description=description, step=whole(content["step"]))
        except (AgrivisionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its description does not fit: {error}") from None


def _check(description: Description) -> None:
    """Raise ValueError where a value is of another kind than training leaves."""
    about = description
    for names, most in ((about.bands, 1 << 10), (about.classes, MAX_CLASSES)):
        if not 1 <= len(_each(label, names)) <= most or len(set(names)) < len(names):
            raise ValueError(f"its bands or classes cannot be used: {', '.join(names)[:100]}")
    if about.class_values and len(_each(_value, about.class_values)) != len(about.classes):
        raise ValueError("not every class has a value")
    for column in (about.mean, about.std, about.data_mean, about.data_std):
        if len(_each(number, column)) != len(about.bands):
            raise ValueError("not every band has its statistics")
    if label(about.dtype) not in DTYPES:
        raise ValueError(f"pixels of the type {about.dtype!r}: one of {', '.join(DTYPES)} belongs here")
    whole(about.tile, 1, MAX_TILE)
    for value in (about.nodata, about.resolution):
        if value is not None:
            number(value)
    label(about.data_fingerprint)
    _check_model(dataclasses.asdict(about.model))


def _check_model(model: dict[str, Any]) -> None:
    whole(model["base_channels"], 1, _WIDEST)
    whole(model["depth"])
    whole(model["deep_supervision"])
    number(model["dropout"])
    for name, known in (
        ("convolution", ("same", "valid")),
        ("up", ("transposed", "bilinear", "pixel_shuffle")),
        ("norm", ("batch", "group", "none")),
        ("block", ("plain", "residual")),
        ("attention", ("none", "gate")),
    ):
        if model[name] not in known:
            raise ValueError(f"its network has {name} {label(model[name])!r}")
    if model["encoder"] is not None:
        label(model["encoder"])
    if model["encoder_weights"] is not None:
        raise ValueError("it names a file with other weights")


def _each(read: Callable[[Any], object], values: Any) -> tuple[object, ...]:
    if type(values) is not tuple:  # which lists have become by now
        raise ValueError(f"{shown(values)} is no list")
    return tuple(map(read, values))


def _value(value: Any) -> int:
    return whole(value, -(2**63))
