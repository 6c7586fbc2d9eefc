"""What TensorBoard shows of a run besides what it computes: configuration, data, attempts, charts."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.config import Config, flatten
from agrivision.data.schema import Schema, Split
from agrivision.model.losses import parts
from agrivision.monitor import summaries
from agrivision.options import to_yaml
from agrivision.rundir import RunDirectory
from agrivision.training import provenance

# Keys that do not decide what is learned: no hyper-parameters.
_NO_HYPERPARAMETERS = (
    "data.path",
    "data.threads",
    "data.prefetch",
    "data.stage",
    "data.max_damaged_share",
    "evaluation.",
    "monitor.",
    "training.keep_",
    "training.checkpoint_every_",
    "training.stall_minutes",
    "training.save_patience_",
)
# What runs are compared by at first sight. TensorBoard takes the list of any one run, so all have the
# same.
_FIRST = {
    "data.batch_size",
    "model.base_channels",
    "optimizer.lr",
    "optimizer.weight_decay",
    "training.epochs",
}
_STAMP = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class About:
    """A run and its attempts.

    Attributes:
        config: of the run.
        schema: of its data set.
        run: its directory.
        attempts: all so far, as in provenance.json, the present one last.
    """

    config: Config
    schema: Schema
    run: RunDirectory
    attempts: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, config: Config, schema: Schema, run: RunDirectory) -> About:
        """As things stand in a run directory."""
        return cls(config=config, schema=schema, run=run, attempts=provenance.attempts(run))

    @property
    def attempt(self) -> int:
        """The number of the present attempt, 1 for the first."""
        return max(1, len(self.attempts))

    @property
    def attempt_text(self) -> str:
        """The present attempt in Markdown: where and with what it runs."""
        known = dict(self.attempts[-1]) if self.attempts else {}
        versions = known.pop("packages", {})
        rows = [("attempt", self.attempt), *known.items(), *versions.items()]
        return _table(("", ""), [(f"**{name}**", value) for name, value in rows])

    def summaries(self) -> dict[str, Any]:
        """What stands once in the event files, by tag; see `TensorBoard`."""
        values = {
            key: value
            for key, value in flatten(self.config.to_dict()).items()
            if not key.startswith(_NO_HYPERPARAMETERS)
        }
        by_class = {f"iou/{name}": f"IoU {name}" for name in self.schema.classes}
        config = to_yaml(self.config.to_dict())
        found = [
            summaries.text("config", f"```yaml\n{config}```"),
            summaries.text("data_set", self._data_set()),
            summaries.layout(_charts(parts(self.config.loss))),
            summaries.experiment(values, {"score/miou": "mIoU"} | by_class, _FIRST),
            summaries.session_start(values, self._name, self._began()),
        ]
        return {summary.value[0].tag: summary for summary in found} | {summaries.SESSION_END: None}

    @property
    def _name(self) -> str:
        """Tells the run from others in folders of the same name."""
        began = time.strftime(_STAMP, time.gmtime(self._began()))
        return f"{self.run.path.resolve().name} {began}"

    def _began(self) -> float:
        """When the run's first attempt began, in seconds since 1970; 0 where nobody knows."""
        try:
            return calendar.timegm(time.strptime(str(self.attempts[0]["started"]), _STAMP))
        except (IndexError, KeyError, ValueError):
            return 0.0

    def _data_set(self) -> str:
        schema = self.schema
        about = [
            ("name", Path(self.config.data.path).name),
            ("source", schema.source),
            ("bands", ", ".join(schema.bands)),
            ("tiles", f"{schema.tile} x {schema.tile} pixels, {schema.dtype}"),
            ("fingerprint", f"`{schema.fingerprint}`"),
        ]
        splits = schema.splits
        tiles = _table(("split", "tiles"), [(name, split.tiles) for name, split in splits.items()])
        labelled = {name: split for name, split in splits.items() if split.labelled}
        shares = _table(
            ("share of the valid pixels", *labelled),
            [
                (name, *(_percent(split, number) for split in labelled.values()))
                for number, name in enumerate(schema.classes)
            ],
        )
        return "\n\n".join([_table(("", ""), about), tiles, shares])


def _percent(split: Split, class_id: int) -> str:
    return f"{100 * split.class_pixels[class_id] / max(split.pixels, 1):.2f} %"


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _charts(losses: Sequence[str]) -> dict[str, Mapping[str, Sequence[str]]]:
    """The charts of a run whose loss has these parts."""
    by_part = {_PARTS[name]: [f"(loss|validation)/{name}$"] for name in losses}
    return _CHARTS | {_LOSS: by_part}


_LOSS = "Loss, training and validation"
_PARTS = {
    "total": "Total",
    "cross_entropy": "Cross-entropy",
    "dice": "Dice",
    "lovasz": "Lovász",
    "pnc": "Positive and negative balance",
}
_CHARTS: dict[str, Mapping[str, Sequence[str]]] = {
    "Score": {
        "mIoU": ["score/miou$"],
        "IoU by class": ["iou/"],
        "Precision by class": ["precision/"],
        "Recall by class": ["recall/"],
    },
    _LOSS: {},  # by its parts, which depend on the run
    "Training": {
        "Learning rate": ["train/learning_rate$"],
        "Gradient norm": ["train/gradient_norm$"],
        "Attempt": ["run/attempt$"],
    },
    "Speed": {
        "Images a second": ["speed/images_per_second$"],
        "Megapixels a second": ["speed/megapixels_per_second$"],
        "Share of time waiting for data": ["speed/waiting_share$"],
        "GPU utilisation": ["gpu/utilisation/"],
        "GPU memory, GiB": ["gpu/memory_gib/"],
        "Checkpoints, seconds": ["checkpoint/"],
    },
}
