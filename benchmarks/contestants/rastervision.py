"""raster-vision: its sliding-window data set, its learner, and its labels that add up probabilities."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from rastervision.core.data import ClassConfig
from rastervision.core.data.label import SemanticSegmentationLabels
from rastervision.pytorch_learner import (
    SemanticSegmentationGeoDataConfig,
    SemanticSegmentationLearner,
    SemanticSegmentationLearnerConfig,
    SemanticSegmentationSlidingWindowGeoDataset,
    SolverConfig,
)

from benchmarks.contestants.scenes import Make, Setting, load_network


def smooth(setting: Setting) -> Make:
    """As its tutorial on prediction does it, with its label store's GeoTIFF of class ids."""
    model, description = load_network(setting)
    classes = ClassConfig(names=list(description.classes), null_class=description.classes[0])
    data = SemanticSegmentationGeoDataConfig(class_config=classes, num_workers=setting.workers)
    config = SemanticSegmentationLearnerConfig(data=data, solver=SolverConfig(batch_sz=setting.batch))

    def make(scene: Path, folder: Path) -> Path:
        windows = SemanticSegmentationSlidingWindowGeoDataset.from_uris(
            class_config=classes,
            image_uri=str(scene),
            image_raster_source_kw={"channel_order": list(range(len(description.bands)))},
            size=setting.side,
            stride=setting.tiling.stride,
            normalize=False,
        )
        with TemporaryDirectory(dir=folder) as beside, setting.autocast():
            learner = SemanticSegmentationLearner(
                config, output_dir=beside, model=model, training=False
            )
            found = learner.predict_dataset(windows, raw_out=True, numpy_out=True, progress_bar=False)
            labels = SemanticSegmentationLabels.from_predictions(
                windows.windows,
                found,
                smooth=True,
                extent=windows.scene.extent,
                num_classes=len(classes),
            )
            labels.save(
                str(folder),
                crs_transformer=windows.scene.raster_source.crs_transformer,
                class_config=classes,
                discrete_output=True,
                smooth_output=False,
            )
        return folder / "labels.tif"

    return make
