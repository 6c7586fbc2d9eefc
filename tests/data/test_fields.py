"""Statistics of fields: counted once when a data set is prepared, and what is made of them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrivision.config import Normalisation
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.fields import FieldStatistics, channels_of
from agrivision.data.indices import ratio
from agrivision.data.labels import valid_mask
from agrivision.data.normalise import Normaliser, Scope
from agrivision.data.schema import Schema
from agrivision.data.shards import Record, Shard, SplitReader, write_shard
from agrivision.errors import ConfigurationError, DatasetError


def pixels_of(reader: SplitReader, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (bands, side, side) and where it is valid."""
    room = Pixels.allocate(reader.schema, 1)
    decode_record(reader.read(tile), reader.schema, room, 0)
    labels = room.labels[0].numpy().view(np.uint16)
    return room.images()[0].numpy(), valid_mask(labels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_they_are_means_and_deviations_of_all_valid_pixels(dataset: Path, split: str) -> None:
    schema = Schema.read(dataset)
    reader = SplitReader(dataset, schema, split)
    fields = FieldStatistics.of(reader)
    values = defaultdict(list)
    for tile in range(len(reader)):
        image, valid = pixels_of(reader, tile)
        channels = np.concatenate(
            [image, ratio(image[3], image[0])[None], ratio(image[1], image[3])[None]]
        )
        values[int(fields.field[tile])].append(channels[:, valid])
    assert channels_of(schema) == (*schema.bands, "ndvi", "ndwi")
    assert len(values) == len(fields.table) > 1
    for field, found in values.items():
        together = np.concatenate(found, axis=1).astype(np.float64)
        assert np.allclose(fields.table[field, 0], together.mean(1), rtol=1e-5, atol=1e-5)
        assert np.allclose(fields.table[field, 1], together.std(1), rtol=1e-4, atol=1e-4)


def test_the_tiles_of_a_field_share_them(dataset: Path) -> None:
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    fields = FieldStatistics.of(reader)
    names = np.concatenate([index["field"] for index in reader.indexes()])
    for one in range(len(reader)):
        for other in range(len(reader)):
            assert (names[one] == names[other]) == (fields.field[one] == fields.field[other])
    tiles = [5, 0, 5]
    assert torch.equal(fields[tiles], torch.stack([fields[[tile]][0] for tile in tiles]))


def test_a_data_set_of_an_earlier_version_can_be_read_but_not_by_field(tmp_path: Path) -> None:
    record = Record(key="a", field="f", files={"rgb.jpg": b"1", "labels.zst": b"2"}, pixels=[1])
    info = write_shard(tmp_path, "00000", [record])
    assert info is not None
    shard = Shard(tmp_path, info, 2)
    assert shard.index.dtype.names is not None
    assert "moments" not in shard.index.dtype.names

    class Reader:
        dataset, schema = tmp_path, Schema.__new__(Schema)

        def indexes(self) -> list[np.ndarray]:
            return [shard.index]

    object.__setattr__(Reader.schema, "bands", ("red",))
    with pytest.raises(DatasetError, match=r"prepare it again, or choose another data\.normalisation"):
        FieldStatistics.of(Reader())  # type: ignore[arg-type]


def images(seed: int = 0, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch, 4, 6, 5), dtype=torch.uint8, generator=generator)


INDICES = ((3, 0), (1, 3))


def normaliser(scope: Scope, nodata: float | None = None) -> Normaliser:
    return Normaliser(mean=(9.0,) * 4, std=(2.0,) * 4, nodata=nodata, scope=scope, indices=INDICES)


def test_each_tile_by_itself_has_mean_zero_and_deviation_one() -> None:
    seen = normaliser("tile")(images())
    assert torch.allclose(seen.mean((2, 3)), torch.zeros(3, 6), atol=1e-5)
    assert torch.allclose(seen.std((2, 3), correction=0), torch.ones(3, 6), atol=1e-4)


def test_what_is_given_counts_and_not_what_is_seen() -> None:
    whole, normal = images(), normaliser("field")
    statistics = normal.statistics(whole)
    cut = normal(whole[..., 1:4, 2:5], statistics=statistics)
    assert torch.equal(cut, normal(whole, statistics=statistics)[..., 1:4, 2:5])
    assert torch.equal(normal(whole), normal(whole, statistics=statistics))


@given(gain=st.floats(0.5, 2), shift=st.floats(0, 50))
def test_another_light_gives_the_same_bands(gain: float, shift: float) -> None:
    dark = images().float()
    normal = Normaliser(mean=(0.0,) * 4, std=(1.0,) * 4, scope="tile")
    assert torch.allclose(normal(dark), normal(dark * gain + shift), atol=1e-3)


def test_empty_pixels_do_not_count_and_stay_zero() -> None:
    whole = images().float()
    holed = whole.clone()
    holed[:, :, :3] = 0
    normal = normaliser("tile", nodata=0.0)
    seen = normal(holed)
    assert not seen[:, :, :3].any()
    assert torch.allclose(seen[:, :, 3:], normal(whole[:, :, 3:]), atol=1e-5)
    assert not normal(torch.zeros(1, 4, 2, 2)).any()


@pytest.mark.parametrize("both", [how for how in get_args(Normalisation) if "+" in how])
def test_both_ways_are_one_after_the_other(dataset: Path, both: str) -> None:
    schema = Schema.read(dataset)
    wide, *narrow = (Normaliser.of(schema, how, ("ndvi", "ndwi")) for how in (both, *both.split("+")))
    pixels = torch.randint(0, 200, (3, 4, 6, 5), dtype=torch.uint8)
    light = 1 + torch.rand(3, 4), torch.rand(3, 4)
    statistics = wide.statistics(pixels.flip(0))
    for known in (None, statistics):
        wanted = torch.cat([each(pixels, *light, known) for each in narrow], dim=1)
        found = wide(pixels, *light, known)
        assert torch.equal(found, wanted)
        assert found.shape[1] == wide.channels == 12
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_even_tile_is_only_centred() -> None:
    assert not normaliser("tile")(torch.full((2, 4, 3, 3), 7.0)).any()


def test_an_index_without_its_bands_is_refused(dataset: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.indices: there is no band rededge among red"):
        Normaliser.of(Schema.read(dataset), "field", ("ndre",))
