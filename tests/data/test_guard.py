"""No raster makes GDAL open what nobody asked for: other files, or the network."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import rasterio

from agrivision.cli import main
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.sources.guard import files_of, is_no_path, vrt_sources
from agrivision.data.sources.rasters import opened, own_mask
from agrivision.data.sources.source import Flaw
from agrivision.errors import SourceError
from agrivision.inference.predict import find_scenes
from tests.data import scenes

SIDE = 256


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def vrt(source: str, *, relative: int = 0, band: str = "", rest: str = "", root: str = "") -> str:
    """A VRT of one band."""
    return (
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"{root}>{rest}'
        f'<VRTRasterBand dataType="Byte" band="1"{band}><SimpleSource>'
        f'<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )


def scene(path: Path, **tags: str) -> Path:
    scenes.write_raster(path, scenes.noise(0, (4, SIDE, SIDE)))
    if tags:
        with rasterio.open(path, "r+") as dataset:
            dataset.update_tags(ns="OVERVIEWS", **tags)
    return path


def use(path: Path, open_it: Callable[[Path], object] = opened) -> None:
    """Everything that preparing and predicting do with a raster."""
    with open_it(path) as dataset:  # type: ignore[attr-defined]
        own_mask(dataset, ((0, 8), (0, 8)))
        dataset.read(1)
        dataset.read(1, out_shape=(16, 16))  # looks for overviews
        dataset.read_masks(1, out_shape=(16, 16))


def with_overviews(path: Path, url: str) -> Path:
    Path(f"{path}.ovr").write_text(vrt(f"/vsicurl/{url}/ovr.tif"))
    return Path(f"{path}.ovr")


def with_mask(path: Path, url: str) -> Path:
    Path(f"{path}.msk").write_text(vrt(f"/vsicurl/{url}/msk.tif"))
    return Path(f"{path}.msk")


def with_large_letters(path: Path, url: str) -> Path:
    return with_overviews(path, url).rename(path.with_name(f"{path.name.upper()}.OVR"))


def with_notes(path: Path, url: str) -> Path:
    Path(f"{path}.aux.xml").write_text(
        '<PAMDataset><Metadata domain="OVERVIEWS">'
        f'<MDI key="OVERVIEW_FILE">/vsicurl/{url}/pam.tif</MDI></Metadata></PAMDataset>'
    )
    return Path(f"{path}.aux.xml")


def with_hidden_notes(path: Path, url: str) -> Path:
    notes = with_notes(path, url)
    notes.write_text(notes.read_text().replace("O", "&#79;").replace("V", "&#86;"))
    return notes


def with_mask_of_masks(path: Path, url: str) -> Path:
    scenes.write_raster(Path(f"{path}.msk"), np.full((1, SIDE, SIDE), 255, np.uint8))
    return with_overviews(Path(f"{path}.msk"), url)


def with_tagged_mask(path: Path, url: str) -> Path:
    return scene(
        Path(f"{path}.msk").with_suffix(".tif"), OVERVIEW_FILE=f"/vsicurl/{url}/tag.tif"
    ).rename(f"{path}.msk")


def with_tags(path: Path, url: str) -> Path:
    return scene(path, OVERVIEW_FILE=f"/vsicurl/{url}/tag.tif")


BESIDE = [
    with_overviews,
    with_mask,
    with_large_letters,
    with_notes,
    with_hidden_notes,
    with_mask_of_masks,
    with_tagged_mask,
    with_tags,
]


@pytest.mark.parametrize("add", BESIDE)
def test_what_stands_beside_a_raster_does_not_lead_elsewhere(
    tmp_path: Path, web: tuple[str, list[str]], add: Callable[[Path, str], Path]
) -> None:
    url, asked = web
    path = scene(tmp_path / "a.tif")
    use(path)
    culprit = add(path, url)
    asked.clear()
    with pytest.raises(Flaw, match=re.escape(str(culprit))) as flaw:
        use(path)
    assert asked == [] and "\n" not in str(flaw.value)
    assert "remove" in str(flaw.value)


def test_gdal_alone_would_follow(tmp_path: Path, web: tuple[str, list[str]]) -> None:
    """The attacks are real: else the tests above could not fail."""
    url, asked = web
    found = set()
    for add in (with_overviews, with_notes, with_tags):
        path = scene(tmp_path / add.__name__ / "a.tif")
        add(path, url)
        asked.clear()
        with suppress(rasterio.errors.RasterioError):
            use(path, lambda each: rasterio.open(each, driver="GTiff"))
        found |= {Path(word).name for word in asked}
    assert {"ovr.tif", "pam.tif", "tag.tif"} <= found


def test_harmless_neighbours_are_used(tmp_path: Path) -> None:
    """A mask that is a TIFF, overviews that are, notes of statistics, a world file."""
    path = tmp_path / "a.png"
    scenes.write_raster(path, scenes.noise(0, (3, SIDE, SIDE)), driver="PNG", crs=None, transform=None)
    Path(tmp_path / "a.pgw").write_text("5\n0\n0\n-5\n2.5\n-2.5\n")
    Path(f"{path}.aux.xml").write_text(
        '<PAMDataset><SRS>EPSG:26914</SRS><PAMRasterBand band="1"><Metadata>'
        '<MDI key="STATISTICS_MEAN">3</MDI></Metadata></PAMRasterBand></PAMDataset>'
    )
    mask = np.full((1, SIDE, SIDE), 255, np.uint8)
    mask[:, :8] = 0
    scenes.write_raster(Path(f"{path}.msk"), mask, crs=None, transform=None)
    with rasterio.open(f"{path}.msk", "r+") as dataset:
        dataset.update_tags(
            INTERNAL_MASK_FLAGS_1="2", INTERNAL_MASK_FLAGS_2="2", INTERNAL_MASK_FLAGS_3="2"
        )
    with opened(path) as dataset:
        assert dataset.transform.a == 5
        assert dataset.crs.to_epsg() == 26914
        inside = own_mask(dataset, ((0, 16), (0, 16)))
    assert not inside[:8].any() and inside[8:].all()


def test_a_vrt_needs_to_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mosaic.vrt"
    path.write_text(vrt(str(scene(tmp_path / "a" / "a.tif"))))
    with pytest.raises(SourceError, match="--allow_vrt"):
        find_scenes(path)
    assert find_scenes(path, allow_vrt=True) == [path]
    scene(tmp_path / "b.tif")
    assert find_scenes(tmp_path) == [tmp_path / "b.tif"]
    assert "--allow_vrt" in caplog.text
    assert find_scenes(tmp_path, allow_vrt=True) == [tmp_path / "b.tif", path]
    table = tmp_path / "scenes.csv"
    table.write_text("scene,label\nmosaic.vrt,b.tif\n")
    assert main(["prepare", str(table), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "--allow_vrt" in capsys.readouterr().err.splitlines()[-1]


def test_a_vrt_that_was_asked_for_gives_the_same_tiles(tmp_path: Path) -> None:
    source = tmp_path / "source"
    scenes.write_source(source, scenes=1, shape=(1, SIDE, SIDE))
    plain = prepare(source, tmp_path / "plain", PrepareOptions(workers=1, tile=128))
    moved = (source / "scenes" / "s0.tif").rename(tmp_path / "elsewhere.tif")
    (source / "scenes" / "s0.vrt").write_text(
        vrt("../../elsewhere.tif", relative=1).replace(
            "<VRTRasterBand",
            f"<SRS>{scenes.CRS}</SRS><GeoTransform>486000, 5, 0, 5209000, 0, -5</GeoTransform>"
            "<VRTRasterBand",
        )
    )
    vrts = prepare(source, tmp_path / "vrt", PrepareOptions(workers=1, tile=128, allow_vrt=True))
    assert vrts.schema.fingerprint == plain.schema.fingerprint
    path = source / "scenes" / "s0.vrt"
    assert [each.resolve() for each in files_of(path)] == [path, moved]


ATTRIBUTE = 'SourceFilename="/vsicurl/{url}/a"'
HOSTILE = {
    "the network": (vrt("/vsicurl/{url}/a.tif"), "is not the path of a file"),
    "a URL": (vrt("{url}/a.tif"), "is not the path of a file"),
    "an archive": (vrt("/vsizip/{folder}/a.zip/a.tif"), "is not the path of a file"),
    "large letters": (vrt("/VSICURL/{url}/a.tif"), "is not the path of a file"),
    "a driver": (vrt("GTIFF_DIR:1:{folder}/a.tif"), "is not the path of a file"),
    "another driver": (vrt("HDF5:{folder}/a.tif://x"), "is not the path of a file"),
    "a VRT in a VRT": (vrt("{folder}/inner.vrt"), "is not one of the formats"),
    "a VRT in text": (vrt("&lt;VRTDataset/&gt;"), "is not the path of a file"),
    "a VRT in disguise": (vrt("{folder}/inner.tif"), "is not what its name says"),
    "a secret": (vrt("{folder}/secret"), "is not one of the formats"),
    "a secret in disguise": (vrt("{folder}/secret.tif"), "is not what its name says"),
    "raw pixels": (vrt("{folder}/a.tif", band=' subClass="VRTRawRasterBand"'), "holds subClass"),
    "a warp": (vrt("{folder}/a.tif", root=' subClass="VRTWarpedDataset"'), "holds subClass"),
    "code": (
        vrt("{folder}/a.tif").replace("<SimpleSource>", "<PixelFunctionCode/><SimpleSource>"),
        "holds PixelFunctionCode",
    ),
    "an attribute for an element": (
        vrt("{folder}/a.tif").replace("<SimpleSource", f"<SimpleSource {ATTRIBUTE}"),
        "holds SourceFilename",
    ),
    "small letters": (
        vrt("{folder}/a.tif").replace("SourceFilename", "sourcefilename"),
        "holds sourcefilename",
    ),
    "overviews": (vrt("{folder}/a.tif", rest='<Metadata domain="OVERVIEWS"/>'), "holds domain"),
    "a coordinate system": (vrt("{folder}/a.tif", rest="<SRS>{url}/crs</SRS>"), "coordinate system"),
    "an entity": (
        f'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>{vrt("&e;")}',
        "declarations",
    ),
    "no file": (vrt("{folder}/missing.tif"), "is no file"),
    "a source with tags": (vrt("{folder}/tags.tif"), "tags that lead"),
    "a source with neighbours": (vrt("{folder}/ovr.tif"), "is no TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_vrt_leads_to_plain_files_only(tmp_path: Path, web: tuple[str, list[str]], name: str) -> None:
    url, asked = web
    scene(tmp_path / "a.tif")
    scene(tmp_path / "tags.tif", OVERVIEW_FILE=f"/vsicurl/{url}/tag.tif")
    with_overviews(scene(tmp_path / "ovr.tif"), url)
    (tmp_path / "secret").write_bytes(b"secret" * 20_000)
    (tmp_path / "secret.tif").write_bytes(b"secret" * 20_000)
    for inner in ("inner.vrt", "inner.tif"):
        (tmp_path / inner).write_text(vrt(f"/vsicurl/{url}/inner.tif"))
    path = tmp_path / "mosaic.vrt"
    content, reason = HOSTILE[name]
    path.write_text(content.replace("{url}", url).replace("{folder}", str(tmp_path)))
    asked.clear()
    with pytest.raises(Flaw, match=reason) as flaw:
        use(path)
    assert asked == [] and "\n" not in str(flaw.value)


def test_a_vrt_behind_a_link_is_looked_at_where_gdal_does(tmp_path: Path) -> None:
    """GDAL begins where a link leads to: looked for beside the link, another file would be tried."""
    for folder in ("here", "there/deep"):
        (tmp_path / folder).mkdir(parents=True)
    scene(tmp_path / "here" / "a.tif")
    (tmp_path / "there" / "a.tif").write_text(vrt("/etc/hostname"))
    hostile = tmp_path / "there" / "x.vrt"
    hostile.write_text(vrt("a.tif", relative=1))
    link = tmp_path / "here" / "x.vrt"
    link.symlink_to(hostile)
    with pytest.raises(Flaw, match="depends on links"):
        use(link)
    link.unlink()
    (tmp_path / "there" / "deep" / "y.vrt").write_text(vrt("../a.tif", relative=1))
    (tmp_path / "here" / "folder").symlink_to(tmp_path / "there" / "deep")
    with pytest.raises(Flaw, match="depends on links"):
        use(tmp_path / "here" / "folder" / "y.vrt")
    # A link beside its target, or to a folder from which nothing goes up, is a file as any other.
    good = tmp_path / "here" / "good.vrt"
    good.write_text(vrt("a.tif", relative=1))
    link.symlink_to("good.vrt")
    use(link)
    (tmp_path / "way").symlink_to(tmp_path / "here")
    use(tmp_path / "way" / "good.vrt")


def test_an_img_takes_no_pixels_from_elsewhere(tmp_path: Path) -> None:
    image, folder = tmp_path / "deep" / "abcde.img", {"driver": "HFA", "USE_SPILL": "YES"}
    image.parent.mkdir()
    pixels = scenes.noise(0, (1, SIDE, SIDE))
    with rasterio.open(
        image, "w", width=SIDE, height=SIDE, count=1, dtype="uint8", **folder
    ) as dataset:
        dataset.write(pixels)
    use(image)
    spilt = image.with_suffix(".ige")
    spilt.rename(tmp_path / "xy.ige")
    content = image.read_bytes()
    assert content.count(b"abcde.ige") == 1
    image.write_bytes(content.replace(b"abcde.ige", b"../xy.ige"))
    with rasterio.open(image, driver="HFA") as dataset:  # GDAL alone follows
        np.testing.assert_array_equal(dataset.read(), pixels)
    with pytest.raises(Flaw, match=r"takes pixels from .*xy\.ige, in another folder"):
        use(image)


def test_a_vrt_of_good_sources_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mosaic.vrt"
    source = scene(tmp_path / "a.tif")
    for text in (
        vrt("a.tif", relative=1),
        vrt(str(source)),
        vrt(str(source), band=' subClass="VRTSourcedRasterBand"'),
    ):
        path.write_text(text)
        assert [each.resolve() for each in vrt_sources(path)] == [source]
        with opened(path) as dataset, rasterio.open(source) as plain:
            np.testing.assert_array_equal(dataset.read(1), plain.read(1))


@pytest.mark.parametrize(
    "text",
    [
        "/vsizip/a.zip/a.tif", "/vsicurl/http://h/a.tif", " /vsimem/a", "http://h/a.tif", "s3://b/a.tif",
        "GTIFF_DIR:1:a.tif", "NETCDF:a.nc:b", "HDF5:a.h5://b", "zip+file://a", "<VRTDataset/>", "",
    ],
)  # fmt: skip
def test_a_table_names_files(tmp_path: Path, text: str) -> None:
    assert is_no_path(text)
    table = tmp_path / "scenes.csv"
    scene(tmp_path / "a.tif")
    table.write_text(f'scene,label\n"{text}",a.tif\n')
    with pytest.raises(SourceError, match=r"line 2: .* is not the path of a file"):
        prepare(table, tmp_path / "out", PrepareOptions(workers=1, allow_vrt=True))


@pytest.mark.parametrize(
    "text", ["a.tif", "folder/a.tif", "./vsi.tif", "/data/vsi/a.tif", "a b.tif", "2021:a.tif", "ü.tif"]
)
def test_a_path_is_one(text: str) -> None:
    assert not is_no_path(text)


@pytest.mark.parametrize(
    "name", ["/vsicurl/{url}/a.tif", "{url}/a.tif", "/vsizip/a.zip", "GTIFF_DIR:1:a.tif", "{vrt}"]
)
def test_a_name_on_the_command_line_is_a_file(
    tmp_path: Path, web: tuple[str, list[str]], name: str
) -> None:
    url, asked = web
    asked.clear()
    text = name.replace("{url}", url).replace("{vrt}", vrt(f"/vsicurl/{url}/a.tif"))
    with pytest.raises(SourceError, match="no such file"):
        find_scenes(Path(text), allow_vrt=True)
    assert asked == []
