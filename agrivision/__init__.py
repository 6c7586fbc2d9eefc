"""agrivision: train a UNet on four-band farmland imagery and turn scenes into maps.

Names are loaded when they are first used, so that `import agrivision` and the command line start before
torch does: a signal that arrives while torch is being imported must already find its handler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agrivision.config import Config as Config
    from agrivision.data.prepare import PrepareOptions as PrepareOptions
    from agrivision.data.prepare import prepare as prepare
    from agrivision.data.sources.synthetic import synthesize as synthesize
    from agrivision.inference.api import Prediction as Prediction
    from agrivision.inference.api import predict_array as predict_array
    from agrivision.inference.api import predict_scene as predict_scene
    from agrivision.inference.exported import load_model as load_model
    from agrivision.inference.predict import PredictOptions as PredictOptions
    from agrivision.inference.scoring import evaluate_run as evaluate_run
    from agrivision.inference.trained import TrainedModel as TrainedModel
    from agrivision.inference.trained import load_run as load_run
    from agrivision.model.unet import UNet as UNet
    from agrivision.options import read_config as read_config
    from agrivision.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "Config": "agrivision.config",
    "PredictOptions": "agrivision.inference.predict",
    "Prediction": "agrivision.inference.api",
    "PrepareOptions": "agrivision.data.prepare",
    "TrainedModel": "agrivision.inference.trained",
    "UNet": "agrivision.model.unet",
    "evaluate_run": "agrivision.inference.scoring",
    "load_model": "agrivision.inference.exported",
    "load_run": "agrivision.inference.trained",
    "predict_array": "agrivision.inference.api",
    "predict_scene": "agrivision.inference.api",
    "prepare": "agrivision.data.prepare",
    "read_config": "agrivision.options",
    "synthesize": "agrivision.data.sources.synthetic",
    "train": "agrivision.training.run",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - all are names


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
