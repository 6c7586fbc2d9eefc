"""Tiles → class-id PNGs, the challenge's submission and a table of which class is in which tile."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.errors import NotWritable
from agrivision.evaluation.presence import tile_scores
from agrivision.inference.tilesets import TileBatch, Tiles
from agrivision.inference.trained import TrainedModel
from agrivision.model.precision import Precision
from agrivision.storage import replacing, storage_error, write_atomically

LABELS, SUBMISSION, PRESENCE = "labels", "submission.zip", "presence.csv"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold


def predict_tiles(
    trained: TrainedModel,
    sets: Sequence[Tiles],
    out: Path,
    *,
    batch_size: int,
    threads: int,
    precision: Precision,
    report: Callable[[int], None],
) -> None:
    """Write the class-id PNGs of tiles, a zip of them and the table of presence.

    Files in `out` of the same names are replaced one by one; any others stay as they are.

    Args:
        trained: the network.
        sets: tiles whose keys `check_keys` has passed.
        out: folder; it gets `labels/KEY.png`, `submission.zip` and `presence.csv`.
        batch_size: tiles in one forward pass.
        threads: that decode and write; 0 decodes in the caller's.
        precision: of the forward pass.
        report: called with the number of tiles finished since the last call.

    Raises:
        SourceError, DatasetError: an image cannot be read.
        StorageError, NotWritable: the disk refused.
    """
    folder = out / LABELS
    make_folder(folder)
    rows: dict[str, list[float]] = {}
    with ThreadPoolExecutor(max(threads, 1), "write") as pool:
        writing: list[Future[None]] = []
        for tiles in sets:
            with closing(tiles.batches(batch_size, threads, trained.device)) as batches:
                for batch in batches:
                    ids, found = _predict(trained, batch, precision)
                    _wait(writing)
                    writing = [
                        pool.submit(_write_ids, folder / f"{key}.png", tile)
                        for key, tile in zip(batch.keys, ids, strict=True)
                    ]
                    rows |= zip(batch.keys, found, strict=True)
                    report(len(batch.keys))
        _wait(writing)
    write_submission(out / SUBMISSION, folder, rows)
    _write_presence(out / PRESENCE, rows, trained.description.classes)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there already is left as it is.

    Raises:
        StorageError, NotWritable: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotWritable(f"cannot write into {folder}: it is no folder") from None
    except OSError as error:
        raise storage_error(folder, error) from error


def _wait(writing: Iterable[Future[None]]) -> None:
    for future in writing:
        future.result()


@torch.inference_mode()
def _predict(
    trained: TrainedModel, batch: TileBatch, precision: Precision
) -> tuple[NDArray[np.uint8], list[list[float]]]:
    """Class ids (tiles, height, width) and scores of presence by tile and class."""
    probabilities = trained.probabilities(batch.images, precision=precision)
    scores = tile_scores(probabilities, batch.valid)
    ids: NDArray[np.uint8] = probabilities.argmax(1).to(torch.uint8).cpu().numpy()
    return ids, scores.tolist()


def _write_ids(path: Path, ids: NDArray[np.uint8]) -> None:
    """Write a PNG of one grey band, 8 bits, whose values are class ids."""
    content = io.BytesIO()
    Pillow.fromarray(ids).save(content, "PNG")
    write_atomically(path, content.getvalue())


def write_submission(path: Path, folder: Path, keys: Iterable[str]) -> None:
    """Zip the PNGs of some tiles as the challenge takes them; the same PNGs give the same bytes.

    Args:
        path: of the zip.
        folder: with KEY.png.
        keys: of the tiles.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key in sorted(keys):
            member = zipfile.ZipInfo(f"{key}.png", _EPOCH)
            member.create_system, member.external_attr = 3, 0o644 << 16  # Unix, rw-r--r--
            archive.writestr(member, (folder / f"{key}.png").read_bytes())


def _write_presence(path: Path, rows: dict[str, list[float]], classes: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *classes])
    writer.writerows(_cells(rows))
    write_atomically(path, text.getvalue().encode())


def _cells(rows: dict[str, list[float]]) -> Iterator[list[str]]:
    for key in sorted(rows):
        yield [key, *(f"{score:.4f}" for score in rows[key])]
