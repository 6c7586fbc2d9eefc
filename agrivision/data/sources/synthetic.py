"""Invented fields in Agriculture-Vision's layout, to try, test and time everything without its data.

A field is one scene, painted as a whole and cut into tiles: bare soil, rows of canopy on it, the eight
anomalies of the 2021 edition in the shares that they have there, other ground around it, and the light
and gain of one flight. Every class can be told apart, but none by the colour of a pixel: each has a
look-alike (dry canopy and dry soil, water and wet soil, weeds and a vigorous crop) from which only the
near-infrared, the rows or the shape tell it.

A field's pixels come from a generator of its own, so they do not depend on which process paints it.
Planes are float32 of the scene's height and width; images have the bands red, green, blue and
near-infrared first, in reflectance that has been scaled to 0-255.
"""

from __future__ import annotations

import math
import multiprocessing
import string
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from agrivision.errors import AgrivisionError, ConfigurationError, SourceError
from agrivision.storage import remove_tree, storage_error

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

_SPLITS = {"train": 0.7, "val": 0.2, "test": 0.1}  # shares of the tiles
_LABELLED = ("train", "val")
_TILES_PER_FIELD = 6
_UNSCORED = "storm_damage"  # a folder of the 2021 edition; these fields had no storm
_PLANS, _FIELDS = range(2)  # streams of random numbers
_JPEG_QUALITY = 92
_NOWHERE = np.float32(np.inf)


@dataclass(frozen=True, kw_only=True)
class _Habit:
    """How common an anomaly is.

    Attributes:
        pixels: its share of all valid pixels.
        fields: share of the fields that have it.
    """

    pixels: float
    fields: float


# In the order in which they are placed: what is bound to a place first, what can grow anywhere last.
_HABITS = {
    "endrow": _Habit(pixels=0.009, fields=0.4),
    "waterway": _Habit(pixels=0.0095, fields=0.3),
    "double_plant": _Habit(pixels=0.0085, fields=0.5),
    "planter_skip": _Habit(pixels=0.0022, fields=0.35),
    "water": _Habit(pixels=0.01, fields=0.35),
    "weed_cluster": _Habit(pixels=0.062, fields=0.6),
    "nutrient_deficiency": _Habit(pixels=0.074, fields=0.5),
    "drydown": _Habit(pixels=0.12, fields=0.5),
}
_CLASSES = tuple(sorted(_HABITS))
_MAY_OVERLAP = {("endrow", "double_plant")}  # the earlier, the later
_DOUBLE_PLANTED_ENDROWS = 0.2  # share of the fields where the two labels overlap


def synthesize(
    out: Path,
    *,
    tiles: int = 96,
    size: int = 256,
    seed: int = 0,
    workers: int = 1,
    report: Callable[[int], None] | None = None,
) -> None:
    """Write invented fields as Agriculture-Vision's 2021 edition would hold them.

    The same seed, tiles and size give the same bytes with any number of workers. From 48 tiles on,
    every class occurs in both train and val. The folder is written beside as `OUT.partial`, where what
    a killed run left is replaced, and appears under its name when it is complete.

    Args:
        out: folder to make; it must not exist, or be empty.
        tiles: tiles of all splits together: 70 % train, 20 % val, 10 % test, at least one each.
        size: height and width of a tile in pixels; what is drawn grows with it, the rows less so.
        seed: of everything that is invented.
        workers: processes to paint with. Each needs about 1.5 GB at a size of 1024, 100 MB at 256.
        report: called in this process with the number of tiles finished since the last call.

    Raises:
        ConfigurationError: a number is out of its range.
        SourceError: `out` is taken.
        StorageError, NotWritable: the disk refused.
        AgrivisionError: the system killed a worker.
    """
    _check(tiles=tiles, size=size, seed=seed, workers=workers)
    plans = _plan(tiles=tiles, seed=seed)
    with _appearing(out.resolve()) as folder:
        _make_folders(folder)
        # closed before the folder goes: no worker may still write where it was
        with closing(_write_fields(folder, plans, size=size, seed=seed, workers=workers)) as fields:
            for finished in fields:
                if report is not None:
                    report(finished)


def _check(*, tiles: int, size: int, seed: int, workers: int) -> None:
    ranges = {
        "tiles": (tiles, tiles >= len(_SPLITS), f"at least {len(_SPLITS)}, one for each split"),
        "size": (size, 32 <= size <= 1024 and size % 8 == 0, "a multiple of 8 from 32 to 1024"),
        "seed": (seed, 0 <= seed < 2**63, "between 0 and 2**63 - 1"),
        "workers": (workers, workers >= 1, "at least 1"),
    }
    for key, (value, good, wanted) in ranges.items():
        if not good:
            raise ConfigurationError(f"{key} is {value}: it must be {wanted}")


# --- Files -------------------------------------------------------------------------------------------


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and goes when it does not."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SourceError(f"{out} exists and is not empty: choose another folder or remove it")
    try:
        if partial.exists():  # of a run that was killed
            remove_tree(partial)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise storage_error(out, error) from error
    finally:
        if partial.exists():
            remove_tree(partial)


def _make_folders(root: Path) -> None:
    for split in _SPLITS:
        folders = ["images/rgb", "images/nir", "boundaries", "masks"]
        if split in _LABELLED:
            folders += [f"labels/{name}" for name in (*_CLASSES, _UNSCORED)]
        for folder in folders:
            (root / split / folder).mkdir(parents=True)


def _write_fields(
    root: Path, plans: list[_FieldPlan], *, size: int, seed: int, workers: int
) -> Generator[int, None, None]:
    """Paint and write all fields; yields the number of tiles of each one that is finished."""
    workers = min(workers, len(plans))
    if workers == 1:
        for plan in plans:
            yield _write_field(root, plan, size, seed)
        return
    # `spawn`: a fork of a process that has threads (torch, OpenMP) may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            jobs = [pool.submit(_write_field, root, plan, size, seed) for plan in plans]
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise AgrivisionError(
                "a worker was killed, perhaps for memory: try fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_field(root: Path, plan: _FieldPlan, size: int, seed: int) -> int:
    """Paint one field and write its tiles; returns their number."""
    scene = _paint(plan, size, _generator(seed, _FIELDS, plan.index))
    for number in range(plan.tiles):
        row, column = divmod(number, plan.grid[1])
        window = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
        left, top = plan.origin[0] + column * size, plan.origin[1] + row * size
        key = f"{plan.code}_{left}-{top}-{left + size}-{top + size}"
        _write_tile(root / plan.split, key, scene, window)
    return plan.tiles


def _write_tile(folder: Path, key: str, scene: _Scene, window: tuple[slice, slice]) -> None:
    image = np.moveaxis(scene.image[(slice(None), *window)], 0, -1)
    _write_jpeg(folder / f"images/rgb/{key}.jpg", image[..., :3], "RGB")
    _write_jpeg(folder / f"images/nir/{key}.jpg", image[..., 3:], "GRAY")
    _write_mask(folder / f"boundaries/{key}.png", scene.inside[window])
    _write_mask(folder / f"masks/{key}.png", scene.valid[window])
    if folder.name in _LABELLED:
        for name, label in scene.labels.items():
            _write_mask(folder / f"labels/{name}/{key}.png", label[window])
        _write_mask(folder / f"labels/{_UNSCORED}/{key}.png", np.zeros_like(scene.valid[window]))


def _write_jpeg(path: Path, image: Bytes, colours: str) -> None:
    pixels = np.ascontiguousarray(image)
    path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=_JPEG_QUALITY, colorspace=colours))


def _write_mask(path: Path, mask: Mask) -> None:
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path, compress_level=3)


# --- Which field has what ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _FieldPlan:
    """What is decided about a field before it is painted.

    Attributes:
        index: number of the field in the whole set.
        split: where its tiles go.
        code: nine upper-case letters and digits, unlike any other field's.
        tiles: how many are cut out of its scene, row by row.
        origin: x and y of the scene's first pixel, as the tiles' names count.
        shares: anomalies that it has, as shares of its valid pixels.
    """

    index: int
    split: str
    code: str
    tiles: int
    origin: tuple[int, int]
    shares: Mapping[str, float]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles in the scene; the last row may have more than are written."""
        rows = math.isqrt(self.tiles)
        return rows, math.ceil(self.tiles / rows)


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers of one thing only: nothing drawn elsewhere can move them."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _plan(*, tiles: int, seed: int) -> list[_FieldPlan]:
    """All fields of all splits; the order is fixed, and so are their indices."""
    counts = {split: max(1, round(share * tiles)) for split, share in _SPLITS.items()}
    counts["train"] += tiles - sum(counts.values())
    plans: list[_FieldPlan] = []
    codes: set[str] = set()
    for number, (split, count) in enumerate(counts.items()):
        rng = _generator(seed, _PLANS, number)
        for field_tiles, shares in _share_out(rng, count):
            plans.append(
                _FieldPlan(
                    index=len(plans),
                    split=split,
                    code=_new_code(rng, codes),
                    tiles=field_tiles,
                    origin=(int(rng.integers(0, 9000)), int(rng.integers(0, 9000))),
                    shares=shares,
                )
            )
    return plans


def _new_code(rng: np.random.Generator, taken: set[str]) -> str:
    """A field code that is not in `taken`, to which it is added."""
    alphabet = list(string.ascii_uppercase + string.digits)
    code = "".join(rng.choice(alphabet, 9))
    while code in taken:
        code = "".join(rng.choice(alphabet, 9))
    taken.add(code)
    return code


def _share_out(rng: np.random.Generator, tiles: int) -> list[tuple[int, dict[str, float]]]:
    """Tiles and anomalies of each field of a split; as a whole, it has the shares of the habits."""
    fields = max(1, round(tiles / _TILES_PER_FIELD))
    counts = [tiles // fields + (number < tiles % fields) for number in range(fields)]
    shares: list[dict[str, float]] = [{} for _ in counts]
    for name, chosen in _choose_fields(rng, fields).items():
        share = _HABITS[name].pixels * tiles / sum(counts[number] for number in chosen)
        for number in chosen:
            shares[number][name] = share
    return list(zip(counts, shares, strict=True))


def _choose_fields(rng: np.random.Generator, fields: int) -> dict[str, list[int]]:
    """Which of a split's fields have which anomaly: at least one has each."""
    orders = {name: [int(number) for number in rng.permutation(fields)] for name in _HABITS}
    numbers = {name: max(1, round(habit.fields * fields)) for name, habit in _HABITS.items()}
    chosen = {name: orders[name][: numbers[name]] for name in _HABITS}
    # The fields with both are chosen, not left to chance: sets with few fields have some, too.
    both = max(1, round(_DOUBLE_PLANTED_ENDROWS * fields))
    first = numbers["endrow"] - both
    chosen["double_plant"] = orders["endrow"][first : first + numbers["double_plant"]]
    return chosen


# --- Noise -------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Plane:
    """Smooth noise of mean 0 and standard deviation 1 whose hills are about `scale` pixels wide."""
    step = max(1.0, scale / 8)  # smooth noise is computed on a coarse grid and enlarged
    coarse = [math.ceil(side / step) + 12 for side in shape]  # what wraps around stays outside
    sigma = scale / step / 4
    down, right = np.fft.fftfreq(coarse[0]), np.fft.rfftfreq(coarse[1])
    low_pass = np.exp(-2 * (math.pi * sigma) ** 2 * (down[:, None] ** 2 + right**2))
    smooth = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(coarse)) * low_pass, s=coarse)
    smooth = (smooth - smooth.mean()) / smooth.std()
    hills = Image.fromarray(smooth.astype(np.float32))
    box = (0, 0, shape[1] / step, shape[0] / step)
    enlarged = hills.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
    return np.asarray(enlarged, dtype=np.float32)


def _ramp(plane: Plane, start: float, end: float) -> Plane:
    """0 up to `start`, 1 from `end` on, a straight line between."""
    ramp: Plane = np.clip((plane - np.float32(start)) / np.float32(end - start), 0, 1)
    return ramp


# --- The ground --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Style:
    """What the tiles of one field have in common. Colours are four bands, shape (4, 1, 1).

    Attributes:
        heading: direction of the rows against the image's x axis, in radians.
        period: pixels from row to row.
        closure: how much of the ground between the rows is covered, 0-1.
        vigour: how much is covered on the rows, 0-1.
        crossing: angle between the rows and the second rows of double planting, in radians.
        grassed: waterways are grassed, else bare and wet.
        soil, canopy, pale, dry, weed, water, grass: colours.
        gain, offset: of the camera.
    """

    heading: float
    period: float
    closure: float
    vigour: float
    crossing: float
    grassed: bool
    soil: Plane
    canopy: Plane
    pale: Plane
    dry: Plane
    weed: Plane
    water: Plane
    grass: Plane
    gain: Plane
    offset: Plane


def _style(rng: np.random.Generator, shares: Mapping[str, float], size: int) -> _Style:
    headland = "endrow" in shares and "double_plant" in shares
    late = "drydown" in shares  # crops dry down when they have closed their rows
    return _Style(
        heading=rng.uniform(0, math.pi),
        period=max(4.0, 6.0 * math.sqrt(size / 256)) * rng.uniform(0.95, 1.3),
        closure=rng.uniform(0.45, 0.65) if late else rng.uniform(0.15, 0.6),
        vigour=rng.uniform(0.85, 1.0),
        crossing=math.pi / 2 if headland else rng.uniform(0.9, 2.2),
        grassed=bool(rng.random() < 0.6),
        soil=np.float32(rng.uniform(0.8, 1.2)) * _colour(rng, 172, 142, 118, 118, spread=0.07),
        canopy=_colour(rng, 62, 104, 66, 184, spread=0.08),
        pale=_colour(rng, 138, 152, 78, 152, spread=0.04),
        dry=_colour(rng, 158, 132, 88, 92, spread=0.05),
        weed=_colour(rng, 66, 132, 62, 222, spread=0.04),
        water=_colour(rng, 66, 66, 70, 14, spread=0.1),
        grass=_colour(rng, 92, 118, 74, 168, spread=0.06),
        gain=np.float32(rng.uniform(0.8, 1.2)) * _colour(rng, 1, 1, 1, 1, spread=0.06),
        offset=rng.normal(8, 8, (4, 1, 1)).astype(np.float32),
    )


def _colour(rng: np.random.Generator, *bands: float, spread: float) -> Plane:
    """Red, green, blue and near-infrared as shape (4, 1, 1), each multiplied by about 1 ± `spread`."""
    mean = np.array(bands, dtype=np.float32).reshape(4, 1, 1)
    return mean * (1 + np.float32(spread) * rng.standard_normal((4, 1, 1), dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """Where things are in a scene.

    Attributes:
        size: side of a tile in pixels.
        along, across: coordinates in pixels along and across the rows, which bend a little.
        depth: pixels to the field's edge, positive inside.
        valid: what the camera saw.
        seen: pixels of tiles that are written.
    """

    size: int
    along: Plane
    across: Plane
    depth: Plane
    valid: Mask
    seen: Mask

    @property
    def inside(self) -> Mask:
        """What belongs to the field."""
        return self.depth > 0

    def turned(self, angle: float) -> tuple[Plane, Plane]:
        """Coordinates along and across a direction that is `angle` radians away from the rows."""
        cosine, sine = math.cos(angle), math.sin(angle)
        return (
            self.along * cosine + self.across * sine,
            self.across * cosine - self.along * sine,
        )


def _survey(rng: np.random.Generator, plan: _FieldPlan, style: _Style, size: int) -> _Ground:
    rows, columns = plan.grid
    shape = rows * size, columns * size
    y, x = np.ogrid[: shape[0], : shape[1]]
    down, right = (y - shape[0] / 2).astype(np.float32), (x - shape[1] / 2).astype(np.float32)
    cosine, sine = math.cos(style.heading), math.sin(style.heading)
    bend = np.float32(0.02 * size)
    along = right * cosine + down * sine + bend * _noise(rng, shape, 1.5 * size)
    across = down * cosine - right * sine + bend * _noise(rng, shape, 2.5 * size)
    return _Ground(
        size=size,
        along=along,
        across=across,
        depth=np.minimum(
            _distance_to_edges(along, rng.uniform(0.02, 0.06, 2)),
            _distance_to_edges(across, rng.uniform(0.0, 0.04, 2)),
        ),
        valid=_swath(rng, right, down),
        seen=(y // size) * columns + x // size < plan.tiles,
    )


def _distance_to_edges(coordinate: Plane, outside: NDArray[np.float64]) -> Plane:
    """Pixels to the nearer of two edges that leave the shares `outside` beyond the low and high one."""
    sample = coordinate[::4, ::4]
    low, high = np.quantile(sample, [outside[0], 1 - outside[1]])
    distance: Plane = np.minimum(coordinate - np.float32(low), np.float32(high) - coordinate)
    return distance


def _swath(rng: np.random.Generator, right: Plane, down: Plane) -> Mask:
    """What the camera saw: in some scenes the flight's edge cuts off a corner."""
    angle = rng.uniform(0, 2 * math.pi)
    side = right * math.cos(angle) + down * math.sin(angle)
    missing = rng.uniform(0.01, 0.04) if rng.random() < 0.4 else 0.0
    edge = np.quantile(side[::4, ::4], 1 - missing) if missing else _NOWHERE
    return np.less(side, edge)


# --- Where anomalies are -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """One anomaly in a scene.

    Attributes:
        label: what somebody would outline, a little generously.
        strength: how much of it there is, 0-1.
    """

    label: Mask
    strength: Plane


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A proposal where an anomaly could be: highest scores first, as many pixels as are wanted.

    Attributes:
        score: the label is where it is highest.
        look: like the score, but with the frayed edges that no outline follows.
        fade: scores above the label's threshold where the strength leaves 0 and where it reaches 1.
    """

    score: Plane
    look: Plane
    fade: tuple[float, float]


def _place_all(
    rng: np.random.Generator, ground: _Ground, style: _Style, shares: Mapping[str, float]
) -> dict[str, _Patch]:
    """A patch for every class; without pixels for those that the field does not have."""
    patches: dict[str, _Patch] = {}
    field = ground.inside & ground.valid
    wanted = np.count_nonzero(field & ground.seen)
    for name in _HABITS:
        others = [patch.label for key, patch in patches.items() if (key, name) not in _MAY_OVERLAP]
        free = field & ~np.logical_or.reduce(others) if others else field
        pixels = math.ceil(shares.get(name, 0) * wanted)
        room = np.flatnonzero(free & ground.seen)
        if pixels and room.size:
            core = _core(room, ground, patches["endrow"].label if name == "double_plant" else None)
            places = _Places(rng=rng, ground=ground, style=style, pixels=pixels, room=room, core=core)
            patches[name] = _outline(_PROPOSE[name](places), free, room, pixels)
        else:
            patches[name] = _Patch(label=np.zeros_like(free), strength=np.zeros_like(ground.depth))
    return patches


def _core(room: NDArray[np.int64], ground: _Ground, endrow: Mask | None) -> NDArray[np.int64]:
    """Where in the room a middle may lie: on end rows, else off the field's edge, else anywhere."""
    on_endrow = room[endrow.reshape(-1)[room]] if endrow is not None else room[:0]
    inner = room[ground.depth.reshape(-1)[room] > 0.1 * ground.size]
    return next(core for core in (on_endrow, inner, room) if core.size)


def _outline(candidate: _Candidate, free: Mask, room: NDArray[np.int64], pixels: int) -> _Patch:
    """The label has `pixels` pixels of those in `room`; the strength fades towards its edge."""
    scores = candidate.score.reshape(-1)[room]
    rank = max(0, scores.size - pixels)
    threshold = float(np.partition(scores, rank)[rank])
    start, end = candidate.fade
    strength = _ramp(candidate.look, threshold + start, threshold + end)
    return _Patch(label=free & (candidate.score >= threshold), strength=strength * free)


@dataclass(frozen=True, kw_only=True)
class _Places:
    """What a proposal may depend on.

    Attributes:
        rng: the field's generator.
        ground, style: of the field.
        pixels: how many the label shall have.
        room: flat indices of the pixels that it may have.
        core: those of them in which the middle of something may lie.
    """

    rng: np.random.Generator
    ground: _Ground
    style: _Style
    pixels: int
    room: NDArray[np.int64]
    core: NDArray[np.int64]

    def anywhere(self) -> int:
        """Flat index of a pixel in the core."""
        return int(self.rng.choice(self.core))


def _hills(places: _Places, scale: float, fade: tuple[float, float]) -> _Candidate:
    """Patches about `scale` tiles wide."""
    size, shape = places.ground.size, places.ground.depth.shape
    rng = places.rng
    score = _noise(rng, shape, scale * size) + 0.25 * _noise(rng, shape, scale * size / 3)
    fray = 0.12 * _noise(rng, shape, max(3.0, scale * size / 8))
    return _Candidate(score=score, look=score + fray, fade=fade)


def _drydown(places: _Places) -> _Candidate:
    return _hills(places, 0.9, (-0.15, 0.4))


def _nutrient_deficiency(places: _Places) -> _Candidate:
    return _hills(places, 0.7, (-0.1, 0.2))


def _weed_cluster(places: _Places) -> _Candidate:
    return _hills(places, 0.3, (0.0, 0.1))


def _water(places: _Places) -> _Candidate:
    return _hills(places, 0.45, (0.02, 0.12))


def _endrow(places: _Places) -> _Candidate:
    """A strip along one of the two edges where the rows end."""
    score = places.ground.along * places.rng.choice(np.array([-1, 1], dtype=np.float32))
    half_row = places.style.period / 2
    return _Candidate(score=score, look=score, fade=(half_row, half_row + 1))


def _waterway(places: _Places) -> _Candidate:
    """A winding band through the whole scene."""
    rng, ground = places.rng, places.ground
    along, across = ground.turned(rng.uniform(0, math.pi))
    bends = np.zeros_like(along)
    slope = np.zeros_like(along)
    for length in (3.0, 1.3, 0.6):  # tiles
        wave = 2 * math.pi / (length * ground.size)
        phase = along * np.float32(wave) + np.float32(rng.uniform(0, 2 * math.pi))
        swing = rng.uniform(0.4, 0.9) / wave / 2
        bends += swing * np.sin(phase)
        slope += swing * wave * np.cos(phase)
    offset = across - bends
    middle = offset.reshape(-1)[places.anywhere()]
    score = -np.abs(offset - middle) / np.sqrt(1 + slope**2)
    width = places.pixels / ground.size / 2
    return _Candidate(score=score, look=score, fade=(0.05 * width, 0.2 * width))


def _double_plant(places: _Places) -> _Candidate:
    """Passes of the planter that cross the rows."""
    return _passes(places, angle=places.style.crossing, rows=4.0, length=0.7)


def _planter_skip(places: _Places) -> _Candidate:
    """Single rows that are missing for a while."""
    return _passes(places, angle=0.0, rows=1.4, length=0.6)


def _passes(places: _Places, *, angle: float, rows: float, length: float) -> _Candidate:
    """Rectangles about `rows` rows wide and `length` tiles long, `angle` radians off the rows.

    The score is minus the distance from the nearest middle, 1 on the rectangle's edge.
    """
    period = places.style.period
    wide = rows * period
    long = length * places.ground.size
    number = max(1, round(places.pixels / (wide * long)))
    long = max(wide, places.pixels / (wide * number))
    along, across = places.ground.turned(angle)
    score = np.full_like(along, -_NOWHERE)
    for _ in range(number):
        middle = places.anywhere()
        centre = np.float32(round(float(across.reshape(-1)[middle]) / period) * period)  # on a row
        far = np.abs(along - along.reshape(-1)[middle]) / np.float32(long / 2)
        aside = np.abs(across - centre) / np.float32(wide / 2)
        score = np.maximum(score, -np.maximum(far, aside))
    return _Candidate(score=score, look=score, fade=(0.1, 0.2))


_PROPOSE: Mapping[str, Callable[[_Places], _Candidate]] = {
    "double_plant": _double_plant,
    "drydown": _drydown,
    "endrow": _endrow,
    "nutrient_deficiency": _nutrient_deficiency,
    "planter_skip": _planter_skip,
    "water": _water,
    "waterway": _waterway,
    "weed_cluster": _weed_cluster,
}


# --- How it looks ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """A painted field.

    Attributes:
        image: uint8 of shape (4, height, width): red, green, blue, near-infrared.
        inside: what belongs to the field.
        valid: what the camera saw; the image is 0 elsewhere.
        labels: mask of each class.
    """

    image: Bytes
    inside: Mask
    valid: Mask
    labels: Mapping[str, Mask]


def _paint(plan: _FieldPlan, size: int, rng: np.random.Generator) -> _Scene:
    style = _style(rng, plan.shares, size)
    ground = _survey(rng, plan, style, size)
    patches = _place_all(rng, ground, style, plan.shares)
    strength = {name: patch.strength for name, patch in patches.items()}
    image = _surroundings(rng, ground, style)
    image = np.where(ground.inside, _field(rng, ground, style, strength), image)
    return _Scene(
        image=_photograph(rng, ground, style, image),
        inside=ground.inside,
        valid=ground.valid,
        labels={name: patches[name].label for name in _CLASSES},
    )


def _mixed(image: Plane, other: Plane, share: Plane) -> Plane:
    """An image of shape (4, height, width) in which `share` (height, width) has become `other`."""
    return image + share * (other - image)


def _field(
    rng: np.random.Generator, ground: _Ground, style: _Style, strength: Mapping[str, Plane]
) -> Plane:
    """The field without light and camera: soil, crop, weeds, waterways and water, in this order."""
    shape, size = ground.depth.shape, ground.size
    wet = _wet_spots(rng, ground)
    rows = _rows(ground, style, strength)
    cover = _cover(rng, ground, style, strength, rows) * (1 - 0.85 * wet)
    image = _mixed(_soil(rng, ground, style, wet), _crop(style, strength, rows), cover)
    clumps = 1 + 0.13 * _noise(rng, shape, max(4.0, 0.02 * size))
    image = _mixed(image, style.weed * clumps, 0.9 * strength["weed_cluster"])
    turf = 1 + 0.05 * _noise(rng, shape, 3.0)
    bed = style.grass * turf if style.grassed else 0.6 * style.soil * turf
    image = _mixed(image, bed, 0.92 * strength["waterway"])
    return _mixed(image, style.water, 0.95 * strength["water"])


def _rows(ground: _Ground, style: _Style, strength: Mapping[str, Plane]) -> Plane:
    """1 on the plants' rows, 0 between them."""
    across_endrows = strength["endrow"] > 0.5
    rows = np.where(across_endrows, _ridges(ground.along, style), _ridges(ground.across, style))
    second = _ridges(ground.turned(style.crossing)[1], style)
    both: Plane = np.maximum(rows, second * strength["double_plant"])
    return both


def _ridges(coordinate: Plane, style: _Style) -> Plane:
    ridges: Plane = 0.5 + 0.5 * np.cos(coordinate * np.float32(2 * math.pi / style.period))
    return ridges


def _cover(
    rng: np.random.Generator,
    ground: _Ground,
    style: _Style,
    strength: Mapping[str, Plane],
    rows: Plane,
) -> Plane:
    """How much of the ground the crop covers, 0-1."""
    shape, size = ground.depth.shape, ground.size
    vigour = style.vigour + 0.1 * _noise(rng, shape, 0.8 * size)
    cover = vigour * (style.closure + (1 - style.closure) * rows)
    cover *= (1 - 0.95 * strength["planter_skip"]) * (1 - 0.12 * strength["endrow"])
    cover *= 1 + 0.15 * strength["double_plant"]
    return np.clip(cover, 0, 1)


def _wet_spots(rng: np.random.Generator, ground: _Ground) -> Plane:
    """Drowned-out dark spots in half of the fields, 0-1: water's look-alikes, they are no anomaly."""
    shape, size = ground.depth.shape, ground.size
    hills = _noise(rng, shape, 0.4 * size) + 0.3 * _noise(rng, shape, 0.1 * size)
    return _ramp(hills, 1.9, 2.2) if rng.random() < 0.5 else np.zeros_like(hills)


def _soil(rng: np.random.Generator, ground: _Ground, style: _Style, wet: Plane) -> Plane:
    """Bare soil, with patches of another kind and clods; the rows' furrows throw shadows."""
    shape, size = ground.depth.shape, ground.size
    kinds = 1 + 0.1 * _noise(rng, shape, 0.7 * size) + 0.04 * _noise(rng, shape, 3.0)
    furrows = 1 - 0.12 * _ridges(ground.across - np.float32(style.period / 4), style)
    soil: Plane = style.soil * (kinds * furrows * (1 - 0.5 * wet))
    return soil


def _crop(style: _Style, strength: Mapping[str, Plane], rows: Plane) -> Plane:
    """Leaves, paler where nutrients lack and brown where they dry; lighter on top of the rows."""
    leaves = _mixed(
        style.canopy * np.ones_like(rows), style.pale, 0.75 * strength["nutrient_deficiency"]
    )
    leaves = _mixed(leaves, style.dry, 0.9 * strength["drydown"])
    return leaves * (0.84 + 0.16 * rows)


def _surroundings(rng: np.random.Generator, ground: _Ground, style: _Style) -> Plane:
    """What lies around the field: a verge of grass, a road along its edge, groups of trees."""
    shape, size = ground.depth.shape, ground.size
    verge = style.grass * (1 + 0.07 * _noise(rng, shape, 0.05 * size + 2))
    crowns = _noise(rng, shape, 0.06 * size + 2)
    woods = _ramp(_noise(rng, shape, 0.5 * size) + 0.4 * crowns, 0.4, 0.6)
    trees = _colour(rng, 44, 66, 44, 168, spread=0.06) * (1 + 0.25 * crowns)
    near, far = 0.035 * size, 0.075 * size
    road = _ramp(-ground.depth, near, near + 1) * _ramp(ground.depth, -far - 1, -far)
    image = _mixed(verge, trees, woods)
    return _mixed(image, _colour(rng, 168, 162, 152, 118, spread=0.05), road)


def _photograph(rng: np.random.Generator, ground: _Ground, style: _Style, image: Plane) -> Bytes:
    """The image as one flight's camera has it: uneven light, its gain and offset, its noise."""
    shape = ground.depth.shape
    light = 1 + 0.07 * _noise(rng, shape, 2.0 * ground.size)
    noise = 6 * rng.standard_normal(image.shape, dtype=np.float32)
    seen = (image * light * style.gain + style.offset + noise) * ground.valid
    pixels: Bytes = np.clip(seen, 0, 255).astype(np.uint8)
    return pixels
