"""From probabilities to classes in another way than by the largest: a factor and a least area by class.

A class whose probability is multiplied before the largest is taken has a lower threshold against the
others. An area of fewer pixels than its class needs becomes a part of what surrounds it. Both are
chosen on a split (`agrivision tune`) and stand in `postprocessing.json` of a run, under the names of
the classes and with the digest of the weights that they were chosen for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from agrivision.errors import BadInput
from agrivision.evaluation.choosing import OBJECTIVES
from agrivision.inference.trained import TrainedModel
from agrivision.json_values import entries, flag, items, label, number, parse, share, whole
from agrivision.maps.legend import NODATA
from agrivision.maps.specks import without_specks
from agrivision.reading import read_plain
from agrivision.storage import write_atomically

FILE = "postprocessing.json"
FORMAT = "agrivision-postprocessing"
VERSION = 1
_MOST_BYTES = 1 << 20
_MOST_FACTOR = 1e6
_MOST_AREA = 1 << 40

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """What is done with probabilities.

    Attributes:
        classes: names by id.
        factors: of the probability, by class id; all 1 takes the likeliest class.
        areas: pixels that an area must have to stay, by class id, on the grid that the network sees in
            training; 0 and 1 keep all.

    Raises:
        BadInput: a factor or an area is missing or cannot be used.
    """

    classes: tuple[str, ...]
    factors: tuple[float, ...]
    areas: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.classes) == len(self.factors) == len(self.areas):
            raise BadInput("post-processing takes a factor and an area for each class")
        if not all(1 / _MOST_FACTOR <= factor <= _MOST_FACTOR for factor in self.factors):
            raise BadInput(f"factors of probabilities are between 1e-6 and 1e6, not {self.factors}")
        if not all(0 <= area <= _MOST_AREA for area in self.areas):
            raise BadInput(f"least areas are whole numbers of pixels from 0, not {self.areas}")

    @classmethod
    def neutral(cls, classes: Sequence[str]) -> Postprocessing:
        """One that changes nothing."""
        count = len(classes)
        return cls(classes=tuple(classes), factors=(1.0,) * count, areas=(0,) * count)

    @property
    def weighs(self) -> bool:
        """Whether a factor changes anything."""
        return any(factor != 1 for factor in self.factors)

    @property
    def sieves(self) -> bool:
        """Whether an area may be too small."""
        return any(area > 1 for area in self.areas)

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """The factors, as probabilities are multiplied by them."""
        return np.array(self.factors, np.float32)

    def likeliest(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The class of each pixel by itself.

        Args:
            probabilities: (batch, classes, height, width) float32.

        Returns:
            int64 (batch, height, width) on the same device.
        """
        if not self.weighs:
            return probabilities.argmax(1)
        weights = torch.from_numpy(self.weights).to(probabilities.device).reshape(-1, 1, 1)
        return (probabilities * weights).argmax(1)

    def decide(self, probabilities: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The class of each pixel of some tiles.

        Args:
            probabilities: (tiles, classes, height, width) float32.
            valid: bool (tiles, height, width).

        Returns:
            int64 (tiles, height, width) on the device of the probabilities.
        """
        ids = self.likeliest(probabilities)
        if not self.sieves:
            return ids
        found = [
            self.sieved(each, there)
            for each, there in zip(ids.to(torch.uint8).cpu().numpy(), valid.cpu().numpy(), strict=True)
        ]
        return torch.from_numpy(np.stack(found)).to(ids.device, ids.dtype) if found else ids

    def sieved(self, ids: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """A map less its small areas; pixels without data stay as they are.

        Args:
            ids: (height, width).
            valid: (height, width), where there is data.
        """
        clean = without_specks(np.where(valid, ids, np.uint8(NODATA)), self.areas)
        return np.where(valid, clean, ids)

    def at(self, trained: float | None, resolution: tuple[float, float] | None) -> Postprocessing:
        """The same on pixels of another size.

        Args:
            trained: metres a pixel in training; None where not known.
            resolution: metres a pixel of a scene, width and height; None where not known.

        Returns:
            With areas of as many pixels as cover the same ground; the same where a size is not known.
        """
        if trained is None or resolution is None:
            return self
        ratio = trained**2 / (resolution[0] * resolution[1])
        areas = tuple(min(_MOST_AREA, round(area * ratio)) for area in self.areas)
        return Postprocessing(classes=self.classes, factors=self.factors, areas=areas)

    def line(self) -> str:
        """For people: `weeds x 1.19, from 64 pixels; water from 128 pixels`."""
        parts = []
        for name, factor, area in zip(self.classes, self.factors, self.areas, strict=True):
            words = [f"x {factor:.3g}"] if factor != 1 else []
            words += [f"from {area} pixels"] if area > 1 else []
            if words:
                parts.append(f"{name} {', '.join(words)}")
        return "; ".join(parts) or "the likeliest class, areas of any size"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Post-processing, and what it was chosen for and on.

    Attributes:
        how: the post-processing.
        step: of the checkpoint.
        weights: digest of the network, see `weights_digest`.
        data_fingerprint: of the data set.
        split: of it.
        objective: that was to become largest: `miou` or `f1`.
        symmetries: whether the network looked from all eight sides.
        precision: of the forward passes.
        before: the objective without post-processing; None where no class has one.
        after: with it, on the split that it was chosen on: more than can be expected elsewhere.
        crossed: on each half of the fields with what was chosen on the other; None where all tiles are
            of one field.
    """

    how: Postprocessing
    step: int
    weights: str
    data_fingerprint: str
    split: str
    objective: str
    symmetries: bool
    precision: str
    before: float | None
    after: float | None
    crossed: float | None

    def write(self, run: Path) -> Path:
        """Write `postprocessing.json` into a run directory, whole or not at all; returns its path.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        classes = self.how.classes
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "weights": self.weights,
            "data_fingerprint": self.data_fingerprint,
            "split": self.split,
            "objective": self.objective,
            "symmetries": self.symmetries,
            "precision": self.precision,
            "score": {"before": self.before, "after": self.after, "crossed": self.crossed},
            "classes": list(classes),
            "factors": dict(zip(classes, self.how.factors, strict=True)),
            "areas": dict(zip(classes, self.how.areas, strict=True)),
        }
        path = run / FILE
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        return path

    @classmethod
    def read(cls, path: Path) -> Chosen:
        """Read what `write` wrote.

        Raises:
            BadInput: it is missing, damaged, or something else.
        """
        try:
            return cls._parse(entries(parse(read_plain(path, _MOST_BYTES))))
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, BadInput) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise BadInput(
                f"{path} is no post-processing that `agrivision tune` wrote ({reason}): --postprocess"
                " takes the file's name, or none and then belongs after the inputs"
            ) from None

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Chosen:
        if content.get("format") != FORMAT:
            raise ValueError("it is of another format")
        if content.get("version") != VERSION:
            raise ValueError(f"this program reads its version {VERSION} only")
        classes = tuple(map(label, items(content["classes"])))
        factors, areas = entries(content["factors"]), entries(content["areas"])
        if set(factors) != set(classes) or set(areas) != set(classes):
            raise ValueError("not every class has a factor and an area")
        score = entries(content["score"])
        return cls(
            how=Postprocessing(
                classes=classes,
                factors=tuple(number(factors[name]) for name in classes),
                areas=tuple(whole(areas[name]) for name in classes),
            ),
            step=whole(content["step"]),
            weights=label(content["weights"]),
            data_fingerprint=label(content["data_fingerprint"]),
            split=label(content["split"]),
            objective=_objective(content["objective"]),
            symmetries=flag(content["symmetries"]),
            precision=label(content["precision"]),
            before=_score(score["before"]),
            after=_score(score["after"]),
            crossed=_score(score["crossed"]),
        )


def _objective(value: Any) -> str:
    if value not in OBJECTIVES:
        raise ValueError(f"what it made largest is none of {', '.join(OBJECTIVES)}")
    return str(value)


def _score(value: Any) -> float | None:
    return None if value is None else share(value)


def weights_digest(trained: TrainedModel) -> str:
    """XXH3-128 of a network's weights, the same for a checkpoint and the safetensors made of it."""
    digest = xxhash.xxh3_128()
    for name, tensor in trained.module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_of(trained: TrainedModel) -> Path | None:
    """The run directory that a network came from; None for an exported file."""
    return trained.folder.parent.parent if trained.folder.is_dir() else None


def find_postprocessing(
    networks: Sequence[TrainedModel], given: Path | None, *, symmetries: bool = False
) -> Postprocessing:
    """The post-processing that goes with what is to predict.

    Args:
        networks: of which predictions are made.
        given: a file; None takes the run's own.
        symmetries: whether they look from all eight sides.

    Raises:
        BadInput: there is none, or it is of another checkpoint, or of other classes.
    """
    chosen = _own(networks) if given is None else Chosen.read(given)
    classes = networks[0].description.classes
    if chosen.how.classes != classes:
        raise BadInput(
            f"{given or FILE} is for the classes {', '.join(chosen.how.classes)}; the network knows"
            f" {', '.join(classes)}"
        )
    if given is not None and chosen.weights not in map(weights_digest, networks):
        logger.warning("%s was chosen for other weights, of step %d", given, chosen.step)
    if symmetries != chosen.symmetries:
        logger.warning(
            "the post-processing was chosen %s --symmetries: it fits best %s",
            "with" if chosen.symmetries else "without",
            "with it" if chosen.symmetries else "without it",
        )
    return chosen.how


def _own(networks: Sequence[TrainedModel]) -> Chosen:
    if len(networks) > 1:
        raise BadInput(
            "several runs have no post-processing in common: give the file, --postprocess FILE"
        )
    trained = networks[0]
    run = run_of(trained)
    if run is None:
        raise BadInput(f"{trained.folder} is no run: give the file, --postprocess FILE")
    path = run / FILE
    if not path.exists():
        raise BadInput(f"there is no {path}: `agrivision tune {run} --data DATASET` makes it")
    chosen = Chosen.read(path)
    if chosen.weights != weights_digest(trained):
        raise BadInput(
            f"{path} was chosen for the checkpoint of step {chosen.step}, and this is"
            f" {trained.folder}: `agrivision tune {trained.folder} --data DATASET` chooses again"
        )
    return chosen


def chosen_for(trained: TrainedModel) -> Chosen | None:
    """The run's own choice for these very weights; None where there is none."""
    run = run_of(trained)
    if run is None:
        return None
    try:
        chosen = Chosen.read(run / FILE)
    except BadInput:
        return None
    return chosen if chosen.weights == weights_digest(trained) else None
