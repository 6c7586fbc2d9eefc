"""Pages for people: nothing in them but what was said, and nothing from elsewhere."""

import base64
import dataclasses
import hashlib
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from agrivision.errors import NotWritable
from agrivision.maps.legend import Legend
from agrivision.maps.page import Confidence, FieldArea, Making, Page, write_index, write_page
from tests.disks import make_read_only, small_disk
from tests.pages import Parsed

EVIL = "<script>alert(1)</script>\"'&\n\u202e\udcff"
BY, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MAKING = Making(
    checkpoints=("run/best",),
    step=12345,
    miou=0.4321,
    data_fingerprint="0123456789abcdef" * 4,
    bands=(("red", "red"), ("nir", "band 4")),
    window=512,
    overlap=128,
    views=8,
    precision="bf16",
)


def page_of(folder: Path, **changes: Any) -> Page:
    stem = changes.get("stem", "north field #1")
    picture = folder / f"{stem}.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    map_ = folder / f"{stem}.tif"
    map_.write_bytes(bytes(12345))
    page = Page(
        stem=stem,
        legend=Legend(classes=("background", "water", "weeds")),
        pixels=(7500, 2499, 1),
        hectares=(1075.0, 24.99, 0.01),
        confidence=Confidence(mean=0.875, by_class=(0.9, 0.5, None), histogram=(0.0, 0.25, 0.75)),
        fields=(
            FieldArea(name="forty", hectares=(1.0, 0.5, 0)),
            FieldArea(name="two", hectares=(2, 0, 0)),
        ),
        making=MAKING,
        height=100,
        width=1000,
        crs="EPSG:32615",
        pixel_size="0.6 x 0.6 m",
        taken="2020-08-31",
        quicklook=picture,
        files=(map_, picture),
    )
    return dataclasses.replace(page, **changes)


def written(folder: Path, page: Page) -> Parsed:
    write_page(folder / f"{page.stem}.html", page)
    return Parsed((folder / f"{page.stem}.html").read_bytes())


def test_it_tells_what_was_found(tmp_path: Path) -> None:
    texts = written(tmp_path, page_of(tmp_path)).texts
    assert texts[0] == texts[1] == "north field #1"  # title and heading
    assert f"1,000 {BY} 100 pixels · 1,100 ha · 2020-08-31" in texts
    table = texts[texts.index("Mean confidence") + 1 :]
    assert table[:5] == ["background", "1,075", "75.0 %", "7,500", "90.0 %"]
    assert table[5:10] == ["water", "24.99", "25.0 %", "2,499", "50.0 %"]
    assert table[10:15] == ["weeds", "0.01", "< 0.1 %", "1", DASH]
    assert table[15:20] == ["All", "1,100", "100 %", "10,000", "87.5 %"]
    fields = texts[texts.index("forty") :]
    assert fields[:5] == ["forty", "1.50", "1.00", "0.50", "0"]
    assert fields[5:10] == ["two", "2.00", "2.00", "0", "0"]
    assert fields[10:15] == ["All", "3.50", "3.00", "0.50", "0"]
    for name, value in (
        ("Checkpoint", "run/best"),
        ("Trained for", "12,345 steps"),
        ("Validation mIoU", "0.432"),
        ("Bands", "red, nir from band 4"),
        ("Windows", f"512 {BY} 512 pixels, 128 shared with the next"),
        ("Test-time augmentation", "8 turned and mirrored views averaged"),
        ("Coordinate system", "EPSG:32615"),
        ("Pixel size", "0.6 x 0.6 m"),
    ):
        assert texts[texts.index(name) + 1] == value


def test_bars_are_as_long_as_the_shares(tmp_path: Path) -> None:
    rects = written(tmp_path, page_of(tmp_path)).all("rect")
    assert [(rect["x"], rect["width"], rect["fill"]) for rect in rects[:3]] == [
        ("0.00", "750.00", "#303030"),
        ("750.00", "249.90", "#e69f00"),
        ("999.90", "0.10", "#cc79a7"),
    ]
    heights = [rect["height"] for rect in rects if "fill" not in rect]
    assert heights == ["0.00", "33.33", "100.00"]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, hectares=None, confidence=None, fields=(), crs=None, pixel_size=None, taken=None,
        quicklook=None, files=(), making=dataclasses.replace(MAKING, miou=None, views=1),
    )  # fmt: skip
    parsed = written(tmp_path, page)
    assert parsed.all("img") == []
    headings = [text for text in parsed.texts if text in ("Classes", "Confidence", "Fields", "Files")]
    assert headings == ["Classes", "Files"]
    assert "Hectares" not in parsed.texts and "Mean confidence" not in parsed.texts
    assert parsed.texts[parsed.texts.index("Coordinate system") + 1] == "none"
    assert parsed.texts[parsed.texts.index("Validation mIoU") + 1] == DASH


def test_a_scene_without_data_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, pixels=(0, 0, 0), hectares=(0.0, 0.0, 0.0), confidence=None)
    parsed = written(tmp_path, page)
    assert "No pixel has data." in parsed.texts
    write_index(tmp_path / "index.html", [page])
    assert "No pixel has data." in Parsed((tmp_path / "index.html").read_bytes()).texts


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    """A scene's name, a class, a field or a band may hold anything."""
    plain = page_of(tmp_path)
    evil = dataclasses.replace(
        plain,
        legend=Legend(classes=(EVIL, EVIL, EVIL)),
        fields=tuple(dataclasses.replace(field, name=EVIL) for field in plain.fields),
        making=dataclasses.replace(
            MAKING, checkpoints=(EVIL, EVIL), bands=((EVIL, EVIL),), precision=EVIL, resampled=EVIL,
            data_fingerprint=EVIL,
        ),
        crs=EVIL, pixel_size=EVIL, taken=EVIL,
    )  # fmt: skip
    write_page(tmp_path / "evil.html", evil)
    content = (tmp_path / "evil.html").read_bytes()
    parsed = Parsed(content)
    expected = written(tmp_path, plain)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in expected.elements]
    assert parsed.all("script") == []
    assert b"\xe2\x80\xae" not in content  # what turns the direction of text
    shown = "<script>alert(1)</script>\"'& \\u202e\\udcff"
    assert parsed.texts.count(shown) >= 3 + 2 + 3  # legend, fields, and how it was made
    write_index(tmp_path / "index.html", [evil], EVIL)
    index = Parsed((tmp_path / "index.html").read_bytes())
    assert index.all("script") == [] and index.texts[0] == shown


@pytest.mark.parametrize("stem", ["a b", "x<y>&'\"", "javascript:alert(1)", "50%25?#é", "\udcff"])
def test_links_lead_to_the_files_beside_it(tmp_path: Path, stem: str) -> None:
    parsed = written(tmp_path, page_of(tmp_path, stem=stem))
    links = [link["href"] for link in parsed.all("a")]
    assert len(links) == 3
    for link in links:
        assert link.startswith("./") and "#" not in link and "?" not in link
        assert (tmp_path / unquote(link[2:], errors="surrogateescape")).is_file()
    assert any("12.3 kB" in text for text in parsed.texts)


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    write_index(tmp_path / "index.html", [page])
    for parsed in (written(tmp_path, page), Parsed((tmp_path / "index.html").read_bytes())):
        policy = next(
            meta["content"]
            for meta in parsed.all("meta")
            if meta.get("http-equiv") == "Content-Security-Policy"
        )
        digest = base64.b64encode(hashlib.sha256(parsed.style.encode()).digest()).decode()
        assert policy == (
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none';"
            " form-action 'none'"
        )
        assert "url(" not in parsed.style and "@import" not in parsed.style
        for tag, attributes in parsed.elements:
            assert tag not in ("script", "link", "iframe", "object", "base")
            assert not any(name == "style" or name.startswith("on") for name in attributes)
            assert re.match(
                r"data:image/jpeg;base64,", attributes.get("src", "data:image/jpeg;base64,")
            )


def test_the_picture_is_in_the_page_and_not_larger_than_needed(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.quicklook is not None
    Image.new("RGB", (4800, 1200), (0, 158, 115)).save(page.quicklook)
    write_index(tmp_path / "index.html", [page])
    index = Parsed((tmp_path / "index.html").read_bytes())
    for parsed, size in ((written(tmp_path, page), (2400, 600)), (index, (360, 90))):
        (image,) = parsed.all("img")
        assert (int(image["width"]), int(image["height"])) == size
        content = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == size
            assert np.abs(np.subtract(picture.getpixel((5, 5)), (0, 158, 115))).max() <= 3


def test_same_content_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        page = page_of(folder)
        write_page(folder / "page.html", page)
        write_index(folder / "index.html", [page])
        contents.append([(folder / file).read_bytes() for file in ("page.html", "index.html")])
    assert contents[0] == contents[1]
    assert not any(str(tmp_path).encode() in content for content in contents[0])


def test_an_index_adds_up_all_scenes(tmp_path: Path) -> None:
    pages = [page_of(tmp_path, stem=stem) for stem in ("a", "b")]
    pages.append(page_of(tmp_path, stem="c", hectares=None))
    pages.append(
        page_of(tmp_path, stem="d", legend=Legend(classes=("corn",)), pixels=(10,), hectares=(1.5,))
    )
    write_index(tmp_path / "index.html", pages, "All of them")
    parsed = Parsed((tmp_path / "index.html").read_bytes())
    texts = parsed.texts
    assert texts[:3] == ["All of them", "All of them", "4 scenes"]
    start = texts.index("background")
    assert texts[start : start + 4] == ["background", "2,150", "75.0 %", "22,500"]
    assert texts[start + 12 : start + 16] == ["All", "2,200", "100 %", "30,000"]
    start = texts.index("corn")
    assert texts[start : start + 4] == ["corn", "1.50", "100 %", "10"]
    assert any("1 without coordinates" in text and "counts twice" in text for text in texts)
    links = [link["href"] for link in parsed.all("a")]
    assert links == ["./a.html", "./b.html", "./c.html", "./d.html"]
    write_index(tmp_path / "index.html", [])
    assert "0 scenes" in Parsed((tmp_path / "index.html").read_bytes()).texts


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    with pytest.raises(NotWritable, match=r"nowhere/page\.html"):
        write_page(tmp_path / "nowhere" / "page.html", page)
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(NotWritable, match=r"index\.html: Read-only"):
            write_index(disk / "index.html", [page])
