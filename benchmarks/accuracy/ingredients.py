"""What recipes are made of: each thing that can be switched on by itself, beside the plain recipe.

By name, the keys that switch it on. Switching it off in another recipe gives these keys the values
that they have in the plain one; where the recommended recipe does not have it, it is added there
instead. That way each ingredient is seen twice: alone, and among all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INGREDIENTS: Mapping[str, Mapping[str, Any]] = {
    # Optimisation
    "learning rate 3e-3": {"optimizer.lr": 3e-3},
    "learning rate 1e-2": {"optimizer.lr": 1e-2},
    "cosine after a warm-up": {"schedule.name": "cosine", "schedule.warmup": 0.1},
    "cosine after a long warm-up": {"schedule.name": "cosine", "schedule.warmup": 0.3},
    "gradient clipping": {"optimizer.clip_norm": 1.0},
    "decaying average of weights": {"training.ema_decay": 0.98, "training.tail_average": 0.0},
    "average of the last weights": {"training.ema_decay": 0.0, "training.tail_average": 0.2},
    "crops that grow": {"data.crop_start": 32},
    # Loss
    "Dice": {"loss.dice_weight": 1.0},
    "Tversky for recall": {
        "loss.dice_weight": 1.0,
        "loss.tversky_alpha": 0.3,
        "loss.tversky_beta": 0.7,
    },
    "Lovász": {"loss.lovasz_weight": 1.0},
    "focal": {"loss.focal_gamma": 2.0},
    "class weights by square root": {"loss.class_weights": "sqrt"},
    "class weights by inverse": {"loss.class_weights": "inverse"},
    "class weights by effective number": {"loss.class_weights": "effective"},
    "positive and negative classes balanced": {"loss.pnc_weight": 1.0},
    "weight of borders": {"loss.border_weight": 5.0},
    "smooth labels at borders": {"loss.border_smoothing": 0.1},
    # Input and augmentation
    "no mirroring": {"augment.flip": False},
    "quarter turns": {"augment.rotate90": True},
    "jittered light": {
        "augment.brightness": 0.2,
        "augment.contrast": 0.1,
        "augment.band_gain": 0.1,
    },
    "scale and rotation": {"augment.scale": 0.2, "augment.rotate": 15.0},
    "elastic deformation": {"augment.elastic": 2.0},
    "NDVI and NDWI": {"data.indices": "ndvi,ndwi"},
    "normalised by range": {"data.normalisation": "range"},
    "normalised by tile": {"data.normalisation": "tile"},
    "normalised by field": {"data.normalisation": "field"},
    "normalised by data set and field": {"data.normalisation": "bands+field"},
    "normalised by range and field": {"data.normalisation": "range+field"},
    # Sampling
    "rare classes' tiles more often": {"data.rare_sampling": 0.3},
    "crops on rare classes": {"data.rare_crops": 1.0},
    # Network
    "residual blocks": {"model.block": "residual"},
    "attention gates": {"model.attention": "gate"},
    "deep supervision": {"model.deep_supervision": 2},
    "pixel shuffle": {"model.up": "pixel_shuffle"},
    "bilinear up-sampling": {"model.up": "bilinear"},
}
