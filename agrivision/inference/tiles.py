"""Tiles → class-id PNGs, the challenge's submission and a table of which class is in which tile."""

from __future__ import annotations

import csv
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.errors import Interrupted
from agrivision.evaluation.presence import tile_scores
from agrivision.inference.journal import (
    FOLDER,
    Journal,
    fingerprint,
    make_folder,
    read_records,
    remove_leftovers,
    require_own_state,
)
from agrivision.inference.postprocessing import Postprocessing
from agrivision.inference.predictor import Predictor
from agrivision.inference.tilesets import TileBatch, Tiles, grouped
from agrivision.locks import FileLock
from agrivision.part import WHOLE, Part, Stop, never
from agrivision.storage import replacing, write_atomically

LABELS, SUBMISSION, PRESENCE = "labels", "submission.zip", "presence.csv"
_POLL_SECONDS = 0.2
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold


@dataclass(frozen=True)
class _Found:
    """A tile that was predicted.

    Attributes:
        identity: of what was read.
        png: XXH3-64 of its file.
        scores: of presence, by class.
    """

    identity: str
    png: str
    scores: list[float]


def predict_tiles(
    predictor: Predictor,
    sets: Sequence[Tiles],
    out: Path,
    *,
    batch_size: int,
    threads: int,
    postprocessing: Postprocessing | None = None,
    report: Callable[[int], None],
    part: Part = WHOLE,
    stop: Stop = never,
) -> int:
    """Write the class-id PNGs of a part's tiles; where all are there, a zip and the table of presence.

    Files in `out` of the same names are replaced one by one; any others stay as they are. What an
    interrupted prediction with the same weights and options has done is not done again.

    Args:
        predictor: what class ids are made with.
        sets: tiles whose keys `check_keys` has passed.
        out: folder; it gets `labels/KEY.png`, `submission.zip` and `presence.csv`.
        batch_size: tiles in one forward pass.
        threads: that decode and write; 0 decodes in the caller's.
        postprocessing: what is done with probabilities; None takes the likeliest class. The scores of
            presence are those of the probabilities in either case.
        report: called with the number of tiles finished since the last call.
        part: which groups of tiles to predict.
        stop: whether to stop before the next batch.

    Returns:
        How many tiles of other parts are still missing.

    Raises:
        Busy: another process predicts the same part, and goes on doing so.
        Untrusted: somebody else has begun here.
        SourceError, DatasetError: an image cannot be read.
        Interrupted: asked to stop; what is finished is kept.
        StorageError, NotWritable: the disk refused.
    """
    folder = out / LABELS
    make_folder(folder)
    state, digest = out / FOLDER / LABELS, _digest(predictor, batch_size, postprocessing)
    require_own_state(state)
    name, what = f"{part.number}-of-{part.of}", f"part {part} into {out}"
    with Journal(state / name, digest, what, stop) as journal:
        before = _found_in(state, digest)
        for tiles, groups in shares(sets, batch_size, part):
            keys = grouped(tiles, batch_size)
            left = [number for number in groups if not _are_there(keys[number], tiles, before, folder)]
            remove_leftovers(folder, {f"{key}.png" for number in left for key in keys[number]})
            report(sum(len(keys[number]) for number in groups) - sum(len(keys[n]) for n in left))
            with closing(tiles.batches(left, batch_size, threads, predictor.device)) as batches:
                predicted = _predicted(predictor, batches, postprocessing, stop)
                with ThreadPoolExecutor(max(threads, 1), "write") as pool:
                    for count in _write(predicted, folder, tiles, journal, pool):
                        report(count)
        journal.sync()
    return _join(sets, out, digest, predictor.description.classes, stop)


def shares(sets: Sequence[Tiles], batch_size: int, part: Part) -> Iterator[tuple[Tiles, Sequence[int]]]:
    """Which groups of each set are a part's: by their place among the groups of all sets."""
    start = 0
    for tiles in sets:
        count = len(grouped(tiles, batch_size))
        yield tiles, [group for group in range(count) if part.takes(start + group)]
        start += count


_Predicted = tuple[Sequence[str], NDArray[np.uint8], list[list[float]]]


def _digest(predictor: Predictor, batch_size: int, after: Postprocessing | None) -> str:
    """Of everything that class ids depend on besides the tile."""
    first, *more = predictor.networks
    others = [fingerprint(network) for network in more]
    how = [batch_size, predictor.precision, predictor.symmetries, others]
    return fingerprint(first, *how, *([] if after is None else [after]))


def _predicted(
    predictor: Predictor, batches: Iterable[TileBatch], after: Postprocessing | None, stop: Stop
) -> Iterator[_Predicted]:
    for batch in batches:
        if stop():
            raise Interrupted("stopped; finished tiles are kept, and the same command goes on")
        yield (batch.keys, *_predict(predictor, batch, after))


def _write(
    predicted: Iterable[_Predicted],
    folder: Path,
    tiles: Tiles,
    journal: Journal,
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Write PNGs while the next batch is predicted; note each batch when its files are there.

    Yields:
        How many tiles were predicted.
    """
    writing: list[tuple[str, list[float], Future[str]]] = []
    try:
        for keys, ids, scores in predicted:
            _note(writing, tiles, journal)
            files = [
                pool.submit(_write_ids, folder / f"{key}.png", tile)
                for key, tile in zip(keys, ids, strict=True)
            ]
            writing = list(zip(keys, scores, files, strict=True))
            yield len(keys)
    finally:
        _note(writing, tiles, journal)


def _note(
    writing: Sequence[tuple[str, list[float], Future[str]]], tiles: Tiles, journal: Journal
) -> None:
    rows = [(key, tiles.identity(key), file.result(), scores) for key, scores, file in writing]
    if rows:
        journal.append(json.dumps(rows).encode())


def _found_in(state: Path, digest: str) -> dict[str, _Found]:
    """What the journals of all parts hold, however many parts there were."""
    found: dict[str, _Found] = {}
    for path in sorted(state.glob("*-of-*")):
        for record in read_records(path, digest):
            for key, identity, png, scores in json.loads(record):
                found[key] = _Found(identity, png, scores)
    return found


def _are_there(keys: Iterable[str], tiles: Tiles, found: Mapping[str, _Found], folder: Path) -> bool:
    return all(_is_there(key, tiles, found, folder) for key in keys)


def _is_there(key: str, tiles: Tiles, found: Mapping[str, _Found], folder: Path) -> bool:
    """Whether a tile was predicted, from what is there now, and its file is still the one written."""
    row = found.get(key)
    if row is None or row.identity != tiles.identity(key):
        return False
    try:
        return xxhash.xxh3_64_hexdigest((folder / f"{key}.png").read_bytes()) == row.png
    except OSError:
        return False


def _join(sets: Sequence[Tiles], out: Path, digest: str, classes: Sequence[str], stop: Stop) -> int:
    """Write what is made of all tiles, if they are there; returns how many are not."""
    with FileLock(out / FOLDER / "join") as lock:
        while not lock.take(alone=True):
            if stop():
                raise Interrupted("stopped while waiting for another part: the same command goes on")
            time.sleep(_POLL_SECONDS)
        found = _found_in(out / FOLDER / LABELS, digest)
        folder = out / LABELS
        missing = sum(not _is_there(key, tiles, found, folder) for tiles in sets for key in tiles.keys)
        if not missing:
            remove_leftovers(out, (SUBMISSION, PRESENCE))
            rows = {key: found[key].scores for tiles in sets for key in tiles.keys}
            write_submission(out / SUBMISSION, folder, rows)
            _write_presence(out / PRESENCE, rows, classes)
    return missing


@torch.inference_mode()
def _predict(
    predictor: Predictor, batch: TileBatch, after: Postprocessing | None
) -> tuple[NDArray[np.uint8], list[list[float]]]:
    """Class ids (tiles, height, width) and scores of presence by tile and class."""
    probabilities = predictor.probabilities(batch.images, statistics=batch.statistics)
    scores = tile_scores(probabilities, batch.valid)
    found = probabilities.argmax(1) if after is None else after.decide(probabilities, batch.valid)
    ids: NDArray[np.uint8] = found.to(torch.uint8).cpu().numpy()
    return ids, scores.tolist()


def _write_ids(path: Path, ids: NDArray[np.uint8]) -> str:
    """Write a PNG of one grey band, 8 bits, whose values are class ids; returns its XXH3-64."""
    content = io.BytesIO()
    Pillow.fromarray(ids).save(content, "PNG")
    write_atomically(path, content.getvalue())
    return xxhash.xxh3_64_hexdigest(content.getbuffer())


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
