"""JPEG files that are decoded on the device: near the CPU's pixels, and damage is named.

On the CPU by the same code, and on a GPU where one is at hand.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torchvision

from agrivision.data.jpeg_pixels import check_decoder
from agrivision.data.loader import Batch, TrainLoader
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ConfigurationError, DatasetError
from agrivision.world import World
from tests.data import scenes

CPU = torch.device("cpu")
GREY_LEVELS = 2  # the inverse transforms of two decoders, rounded, and the colours made of them


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return torch.device(request.param)


def batches(dataset: Path, decoder: str, *, threads: int = 2, pinned: bool = False) -> list[Batch]:
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    order = Order(size=len(reader), batch_size=7, seed=3)
    with TrainLoader(reader, order, World(), threads=threads, decoder=decoder, pinned=pinned) as loader:
        return [loader.next_batch() for _ in range(6)]


@pytest.mark.parametrize("threads", [0, 2])
def test_the_pixels_are_near_and_the_labels_the_same(
    dataset: Path, device: torch.device, threads: int
) -> None:
    expected = batches(dataset, "cpu")
    found = batches(dataset, "gpu", threads=threads, pinned=device.type == "cuda")
    for batch, other in zip(found, expected, strict=True):
        assert (batch.tiles, batch.count) == (other.tiles, other.count)
        pixels = batch.pixels.to(device)
        assert torch.equal(pixels.labels.cpu(), other.pixels.labels)
        for plane, plane_there in zip(pixels.planes, other.pixels.planes, strict=True):
            assert plane.dtype == torch.uint8
            assert plane.is_contiguous()
            assert plane.shape == plane_there.shape
            difference = plane.cpu().int() - plane_there.int()
            assert difference.abs().max() <= GREY_LEVELS
        images = pixels.images()
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_batch(dataset: Path, device: torch.device) -> None:
    pixels = batches(dataset, "gpu")[0].pixels
    whole, part = pixels.to(device), pixels.part(slice(2, 5)).to(device)
    assert torch.equal(part.images(), whole.part(slice(2, 5)).images())
    assert torch.equal(part.label_bits(), whole.part(slice(2, 5)).label_bits())
    assert torch.equal(pixels.images(), pixels.to(CPU).images())


def test_files_stay_as_they_were_when_others_are_read(dataset: Path) -> None:
    once, again = (batches(dataset, "gpu") for _ in range(2))
    for batch, other in itertools.chain(zip(once, again, strict=True)):
        assert torch.equal(batch.pixels.images(), other.pixels.images())


def test_an_image_of_another_size_is_named_before_it_is_decoded(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SplitReader.read

    def other(reader: SplitReader, tile: int) -> list[memoryview]:
        rgb, _, labels = read(reader, tile)
        return [rgb, rgb, labels]

    monkeypatch.setattr(SplitReader, "read", other)
    with pytest.raises(
        DatasetError, match=r"^tile \S+ in .*\.tar: nir.jpg: 64 x 64 pixels with 3 bands"
    ):
        batches(dataset, "gpu")


def test_a_jpeg_that_cannot_be_decoded_is_one_line(
    dataset: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = batches(dataset, "gpu")[0].pixels
    files = [torch.zeros(100, dtype=torch.uint8) for _ in pixels.files[0]]
    broken = [files, *pixels.files[1:]]
    monkeypatch.setattr(type(pixels), "files", property(lambda _: broken), raising=False)
    with pytest.raises(DatasetError, match=r"^rgb.jpg: a JPEG cannot be decoded on c\w+ \(") as error:
        pixels.to(device)
    assert "\n" not in str(error.value)


# Where it cannot be had


def test_without_a_gpu_it_is_refused(dataset: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^data.decoder is gpu, but the run is on cpu: take"):
        check_decoder(Schema.read(dataset), CPU)


@pytest.mark.parametrize("raw", [False, True])
def test_other_files_than_jpeg_are_refused(tmp_path: Path, prepared, raw: bool) -> None:
    scenes.write_source(tmp_path / "source", scenes=2)
    schema = prepared(tmp_path / "source", tile=32, val=("s1.tif",), raw=raw).schema
    with pytest.raises(ConfigurationError, match=r"the data set holds image.\w+.*: only JPEG can be"):
        check_decoder(schema, torch.device("cuda"))


def test_a_torchvision_without_it_is_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not\ncompiled with nvJPEG support")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse)
    with pytest.raises(ConfigurationError, match=r"has no nvJPEG here \(.*not compiled with nvJPEG"):
        check_decoder(Schema.read(dataset), torch.device("cuda"))


def test_where_it_works_it_is_taken(dataset: Path, device: torch.device) -> None:
    if device.type == "cuda":
        check_decoder(Schema.read(dataset), device)
