"""Exported networks: the same probabilities as the original's, and nothing but data when loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray

from agrivision import checkpoint
from agrivision.cli import main
from agrivision.config import ModelConfig
from agrivision.data.schema import Schema
from agrivision.errors import AgrivisionError, BadInput, CheckpointError, Unfaithful
from agrivision.inference import export as export_module
from agrivision.inference.about import KEY, About
from agrivision.inference.export import export, find_samples
from agrivision.inference.exported import SUFFIXES, Form, load_model
from agrivision.inference.journal import fingerprint
from agrivision.inference.scoring import evaluate_run
from agrivision.inference.trained import Description, TrainedModel, load_run
from agrivision.model.build import build_model
from tests.inference.small import BANDS, CLASSES, TILE, smooth, write_scene
from tests.payload import as_torch, watched

FORMS: tuple[Form, ...] = ("safetensors", "torch-export", "onnx")
SHAPES = [(1, 64, 64), (3, 37, 41), (1, 1, 1), (2, 1, 7), (1, 100, 3)]
forms = pytest.mark.parametrize("form", FORMS)


def needs(form: str) -> None:
    if form == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)


def make_run(folder: Path, fingerprint: str = "f" * 64, seed: int = 3, **model: Any) -> TrainedModel:
    """A run whose weights, running statistics and logits are of the size that training leaves."""
    config = ModelConfig(**({"base_channels": 4, "depth": 1} | model))
    description = Description(
        model=config,
        bands=BANDS,
        classes=CLASSES,
        class_values=(),
        dtype="uint8",
        tile=TILE,
        mean=(110.0, 112.0, 113.0, 118.0),
        std=(40.0, 41.0, 42.0, 46.0),
        nodata=0.0,
        data_fingerprint=fingerprint,
    )
    torch.manual_seed(seed)
    module = build_model(config, len(BANDS), len(CLASSES))
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    states = {"model": module.state_dict(), "description": description.to_dict()}
    checkpoint.save(folder / "checkpoints", states, step=7, epoch=1)
    return load_run(folder, "cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> TrainedModel:
    """A run that names its data set and has been scored."""
    folder = tmp_path_factory.mktemp("original")
    trained = make_run(folder, Schema.read(dataset).fingerprint)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(dataset)}}))
    iou = dict.fromkeys(CLASSES, 0.25) | {CLASSES[0]: 0.75, CLASSES[1]: None}
    rows = [
        {"kind": "evaluation", "step": 6, "miou": 0.9, "iou": {}},
        {"kind": "evaluation", "step": 7, "miou": 0.375, "iou": iou},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trained


@pytest.fixture(scope="module")
def exported(
    original: TrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Form], Path]:
    """The file of each form, made once."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def make(form: Form) -> Path:
        needs(form)
        out = folder / f"network{SUFFIXES[form]}"
        summary = export(original, out, form, find_samples(original, None, None, 2))
        assert (summary.out, summary.bytes) == (out, out.stat().st_size)
        return out

    return make


def images(batch: int, height: int, width: int) -> NDArray[np.uint8]:
    """Noise, with some pixels that are empty."""
    pixels = np.random.default_rng(5).integers(0, 256, (batch, 4, height, width), dtype=np.uint8)
    pixels[:, :, : height // 8] = 0
    return pixels


def assert_alike(one: TrainedModel, other: TrainedModel, bound: float = 1e-5) -> None:
    for shape in SHAPES:
        wanted, found = (each.probabilities(images(*shape)) for each in (one, other))
        assert found.shape == wanted.shape and found.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound)
        assert (wanted.argmax(1) == found.argmax(1)).all()


@forms
def test_the_exported_network_is_the_original(
    form: Form, original: TrainedModel, exported: Callable[[Form], Path]
) -> None:
    """Any number of images of any size, no multiples of what the network halves among them."""
    again = load_model(exported(form), "cpu")
    assert (again.description, again.step) == (original.description, original.step)
    assert again.folder == exported(form)
    assert_alike(original, again, bound=0 if form == "safetensors" else 1e-5)


@forms
def test_it_gets_the_same_score(
    form: Form, original: TrainedModel, exported: Callable[[Form], Path], dataset: Path
) -> None:
    wanted = evaluate_run(original.folder, dataset, "val", threads=0)
    found = evaluate_run(exported(form), dataset, "val", threads=0)
    assert wanted is not None and found is not None
    assert found["confusion"] == wanted["confusion"]
    assert np.sum(found["confusion"]) > 0


def test_torch_opens_what_is_ours(original: TrainedModel, exported: Callable[[Form], Path]) -> None:
    network: Any = torch.export.load(exported("torch-export")).module()
    for shape in SHAPES:
        pixels = torch.from_numpy(images(*shape))
        torch.testing.assert_close(
            network(pixels.float()), original.probabilities(pixels), rtol=0, atol=1e-4
        )


def test_onnxruntime_opens_it_alone(original: TrainedModel, exported: Callable[[Form], Path]) -> None:
    path = exported("onnx")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(path, full_check=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape) == ("pixels", ["batch", 4, "height", "width"])
    assert given.name == "probabilities"
    assert [given.shape[place] for place in (0, 2, 3)] == ["batch", "height", "width"]
    assert About.from_text(session.get_modelmeta().custom_metadata_map[KEY]) == About.of(original)
    for shape in SHAPES:
        (found,) = session.run(None, {"pixels": images(*shape).astype(np.float32)})
        wanted = original.probabilities(images(*shape)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_safetensors_is_the_weights(original: TrainedModel, exported: Callable[[Form], Path]) -> None:
    found = safetensors.torch.load_file(exported("safetensors"))
    wanted = original.module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_other_bytes_are_another_network(
    form: Form, exported: Callable[[Form], Path], tmp_path: Path
) -> None:
    """What `predict` goes on with is told apart by this."""
    path = exported(form)
    other = tmp_path / path.name
    if form == "onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(path)
        model.doc_string = "another"
        onnx.save(model, other)
    else:
        rewrite(path, other, lambda name, content: content)
    prints = [fingerprint(load_model(each, "cpu")) for each in (path, path, other)]
    assert prints[0] == prints[1] != prints[2]


def test_bf16_runs_where_it_can(exported: Callable[[Form], Path], original: TrainedModel) -> None:
    program, network = (load_model(exported(form), "cpu") for form in ("torch-export", "onnx"))
    wanted = original.probabilities(images(1, 32, 32), precision="bf16")
    found = program.probabilities(images(1, 32, 32), precision="bf16")
    assert not torch.equal(wanted, original.probabilities(images(1, 32, 32)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    with pytest.raises(BadInput, match="bf16"):
        network.probabilities(images(1, 32, 32), precision="bf16")


@forms
def test_it_predicts_a_scene_as_the_run_does(
    form: Form,
    original: TrainedModel,
    exported: Callable[[Form], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a path that is relative, as users type it."""
    scene = write_scene(tmp_path / "scene.tif", smooth(np.random.default_rng(4), 90, 110))
    monkeypatch.chdir(exported(form).parent)
    maps = []
    for number, checkpoint_path in enumerate([str(original.folder), exported(form).name]):
        out = tmp_path / str(number)
        command = ["predict", "--checkpoint", checkpoint_path, str(scene), "--out", str(out)]
        assert main([*command, "--confidence"]) == 0
        maps.append(out)
    for name, bound in (("scene.tif", 0), ("scene.confidence.tif", 1)):  # a step, by rounding
        with rasterio.open(maps[0] / name) as wanted, rasterio.open(maps[1] / name) as found:
            assert np.abs(wanted.read().astype(int) - found.read()).max() <= bound
    items = [json.loads((folder / "scene.json").read_text())["properties"] for folder in maps]
    # The card has the score of an exported network; its file knows no run.
    assert [item.get("agrivision:miou") for item in items] == [0.375, None]


# What is written, and when.


@forms
def test_the_card_says_what_is_needed(
    form: Form, exported: Callable[[Form], Path], dataset: Path
) -> None:
    path = exported(form)
    card = path.with_name(path.name + ".md").read_text()
    _, head, body = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "agrivision" and about["pipeline_tag"] == "image-segmentation"
    ((result,),) = (entry["results"] for entry in about["model-index"])
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["mIoU"] == 0.375 and values[f"IoU {CLASSES[0]}"] == 0.75
    assert f"IoU {CLASSES[1]}" not in values  # it was absent
    for words in (*BANDS, *CLASSES, "uint8", "110", "40", path.name, torch.__version__, form):
        assert words in body
    assert Schema.read(dataset).fingerprint in body
    assert "largest difference" in body and f"tiles of {dataset} (val)" in body


@pytest.mark.parametrize("found", [0.5, float("nan")])
def test_what_is_not_the_same_is_not_written(
    found: float, original: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another network comes out: it does not take the name, and what had it before keeps it."""
    out = tmp_path / "network.safetensors"
    out.write_bytes(b"precious")
    write = export_module._WRITERS["safetensors"]

    def wrong(trained: TrainedModel) -> bytes:
        weights = safetensors.torch.load(write(trained))
        weights["head.weight"][0] += found
        return safetensors.torch.save(weights, {KEY: About.of(trained).to_text()})

    monkeypatch.setitem(export_module._WRITERS, "safetensors", wrong)
    samples = find_samples(original, None, None, 1)
    with pytest.raises(Unfaithful, match="largest difference") as error:
        export(original, out, "safetensors", samples)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    assert out.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_read_back_is_not_written(
    original: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_module._WRITERS, "safetensors", lambda _: b"half")
    samples = find_samples(original, None, None, 1)
    with pytest.raises(BadInput, match="safetensors takes any"):
        export(original, tmp_path / "network.safetensors", "safetensors", samples)
    assert list(tmp_path.iterdir()) == []


def test_where_the_images_come_from(
    original: TrainedModel, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = find_samples(original, None, None, 3)
    given = find_samples(original, dataset, "train", 3)
    assert f"{dataset} (val)" in own.origin and f"{dataset} (train)" in given.origin
    assert [batch.shape for batch in own.batches] == [(1, 4, 64, 64)] * 3 + [(3, 4, 61, 59)]
    assert not np.array_equal(own.batches[0], given.batches[0])
    lonely = make_run(tmp_path / "lonely")
    made = find_samples(lonely, None, None, 2)
    assert "made up" in made.origin and "--data" in made.origin
    assert [batch.dtype for batch in made.batches] == [np.uint8] * 3
    (tmp_path / "lonely" / "config.yaml").write_text("data:\n  path: " + str(tmp_path))
    assert "made up" in find_samples(lonely, None, None, 2).origin
    assert "dataset.json" in caplog.text
    with pytest.raises(AgrivisionError, match="no split 'trian'"):
        find_samples(original, dataset, "trian", 3)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_line_says_how_to_get_it(
    missing: str, original: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    samples = find_samples(original, None, None, 1)
    with pytest.raises(BadInput, match=r"pip install 'agrivision\[onnx\]'"):
        export(original, tmp_path / "network.onnx", "onnx", samples)
    assert list(tmp_path.iterdir()) == []
    if missing != "onnxscript":  # which only writes
        (tmp_path / "network.onnx").write_bytes(b"x")
        with pytest.raises(BadInput, match=r"pip install 'agrivision\[onnx\]'"):
            load_model(tmp_path / "network.onnx")


def test_as_a_user(
    original: TrainedModel, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = original.folder.parent.parent, tmp_path / "new" / "network.safetensors"
    command = ["export", "--checkpoint", str(run), "--format", "safetensors"]
    assert main([*command, "--out", str(out), "--tiles", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 tiles of" in said and "the largest difference of a probability is 0," in said
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.name}.md"}
    assert main(["evaluate", "--checkpoint", str(out), "--data", str(dataset)]) == 0
    again = [*command, "--checkpoint", str(out), "--out", str(out)]  # of itself
    assert main([*again, "--data", str(dataset), "--split", "train"]) == 0
    for wrong, words in [
        (["--out", str(tmp_path / "network.pt2")], ".safetensors"),
        (["--out", str(original.folder / "mine.safetensors")], "is a checkpoint"),
        (["--out", str(out), "--tiles", "0"], "tiles is 0"),
        (["--out", str(out), "--format", "pickle"], "pickle"),
        (["--out", str(out), "--data", str(tmp_path)], "dataset.json"),
    ]:
        capsys.readouterr()
        assert main([*command, *wrong]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("error: ") == 1


def test_what_is_exported_already_is_no_source(
    exported: Callable[[Form], Path], original: TrainedModel, tmp_path: Path
) -> None:
    program = load_model(exported("torch-export"), "cpu")
    with pytest.raises(BadInput, match="exported already"):
        export(program, tmp_path / "x.pt2", "torch-export", find_samples(original, None, None, 1))


def test_a_file_of_a_checkpoint_still_means_the_checkpoint(original: TrainedModel) -> None:
    assert load_model(original.folder / "model.safetensors", "cpu").folder == original.folder
    assert load_model(original.folder.parent.parent, "cpu").step == 7


# Files from elsewhere.


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    with watched(tmp_path / "mark") as found:
        yield found


Change = Callable[[str, bytes], bytes | None]


def rewrite(path: Path, out: Path, change: Change, **more: bytes) -> Path:
    """A copy of an archive with other entries; None leaves one out, `more` come from anybody."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = change(name.removeprefix(f"{root}/"), old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return out


def in_json(wanted: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def changed(name: str, content: bytes) -> bytes:
        if name != wanted:
            return content
        values = json.loads(content)
        change(values)
        return json.dumps(values).encode()

    return changed


WEIGHTS, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path, "cpu")
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line) < 2100
    return line


def test_a_pickled_weight_is_refused(
    exported: Callable[[Form], Path], mark: Path, tmp_path: Path
) -> None:
    """torch.export.load would run it."""

    def use(values: dict[str, Any]) -> None:
        next(iter(values["config"].values()))["use_pickle"] = True

    listed = in_json(WEIGHTS, use)
    content = {"data/weights/weight_0": as_torch(mark)}
    path = rewrite(
        exported("torch-export"),
        tmp_path / "x.pt2",
        lambda name, old: content.get(name) or listed(name, old),
    )
    assert "pickled" in refused(path)
    with pytest.raises(Exception):  # noqa: B017, PT011 - what follows the payload does not matter
        torch.export.load(path)
    assert mark.is_dir()  # it does what it says
    mark.rmdir()


@pytest.mark.parametrize("name", ["data/sample_inputs/model.pt", "data/weights/model.pt"])
def test_a_pickle_beside_is_never_opened(
    name: str, exported: Callable[[Form], Path], original: TrainedModel, mark: Path, tmp_path: Path
) -> None:
    keep: Change = lambda entry, content: None if entry == name else content  # noqa: E731
    path = rewrite(exported("torch-export"), tmp_path / "x.pt2", keep, **{name: as_torch(mark)})
    assert_alike(original, load_model(path, "cpu"))


def test_the_text_of_a_size_is_never_evaluated(
    exported: Callable[[Form], Path], original: TrainedModel, mark: Path, tmp_path: Path
) -> None:
    """torch.export.load gives it to sympy, which gives it to Python."""

    def plant(values: dict[str, Any]) -> None:
        sizes = values["graph_module"]["graph"]["sym_int_values"]
        code = {"expr_str": f"__import__('os').mkdir({str(mark)!r})", "hint": {"as_int": 7}}
        sizes |= {name: {"as_expr": code} for name in sizes}

    path = rewrite(exported("torch-export"), tmp_path / "x.pt2", in_json(GRAPH, plant))
    assert_alike(original, load_model(path, "cpu"))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - what follows the payload does not matter
        torch.export.load(path)
    assert mark.is_dir()
    mark.rmdir()


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.as_strided_.default",
        "torch.ops.aten.__class__.default",
        "torch.ops.load_library",
        "torch.load",
        "torch.hub.load",
        "_operator.call",
        "_operator.attrgetter",
        "math.__loader__",
        "#fairseq",
        "os.system",
        "",
    ],
)
def test_an_operator_that_is_not_known_is_refused(
    target: str, exported: Callable[[Form], Path], tmp_path: Path
) -> None:
    def plant(values: dict[str, Any]) -> None:
        values["graph_module"]["graph"]["nodes"][3]["target"] = target

    path = rewrite(exported("torch-export"), tmp_path / "x.pt2", in_json(GRAPH, plant))
    assert "not among the known operators" in refused(path)


def wide(values: dict[str, Any]) -> None:
    meta = next(iter(values["config"].values()))["tensor_meta"]
    meta["sizes"][0]["as_int"] = 10**6


def much_of_little(values: dict[str, Any]) -> None:
    meta = next(iter(values["config"].values()))["tensor_meta"]
    meta["sizes"] = [{"as_int": 10**4} for _ in meta["sizes"]]
    meta["strides"] = [{"as_int": 0} for _ in meta["strides"]]


def behind(values: dict[str, Any]) -> None:
    next(iter(values["config"].values()))["tensor_meta"]["storage_offset"]["as_int"] = 10**9


def elsewhere(values: dict[str, Any]) -> None:
    next(iter(values["config"].values()))["path_name"] = "../../../../etc/hostname"


def later(values: dict[str, Any]) -> None:
    values["graph_module"]["graph"]["nodes"].reverse()


def another_version(values: dict[str, Any]) -> None:
    values["schema_version"]["major"] = 99


def no_graph(values: dict[str, Any]) -> None:
    values["graph_module"] = []


def two_inputs(values: dict[str, Any]) -> None:
    specs = values["graph_module"]["signature"]["input_specs"]
    specs.append(specs[-1])


def a_submodule(values: dict[str, Any]) -> None:
    node = values["graph_module"]["graph"]["nodes"][3]
    node["inputs"][0]["arg"] = {"as_graph": {"name": "x", "graph": {}}}


@pytest.mark.parametrize(
    ("entry", "change", "words"),
    [
        (WEIGHTS, wide, "a tensor of [1000000"),
        (WEIGHTS, much_of_little, "a tensor of [10000, 10000, "),
        (WEIGHTS, behind, "out of bounds"),
        (WEIGHTS, elsewhere, "is pickled"),
        (GRAPH, later, "before it is there"),
        (GRAPH, another_version, "format 99"),
        (GRAPH, no_graph, "no object"),
        (GRAPH, two_inputs, "2 inputs"),
        (GRAPH, a_submodule, "as_graph"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_does_not_fit(
    entry: str,
    change: Callable[[dict[str, Any]], None],
    words: str,
    exported: Callable[[Form], Path],
    tmp_path: Path,
) -> None:
    path = rewrite(exported("torch-export"), tmp_path / "x.pt2", in_json(entry, change))
    assert words in refused(path)


def test_compiled_code_is_refused(exported: Callable[[Form], Path], tmp_path: Path) -> None:
    keep: Change = lambda _, content: content  # noqa: E731
    more = {"data/aotinductor/model/x.so": b"\x7fELF"}
    assert "compiled code" in refused(
        rewrite(exported("torch-export"), tmp_path / "x.pt2", keep, **more)
    )


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/models/model.json", b" " * 10**7)
    assert "compressed" in refused(tmp_path / "x.pt2")


@forms
def test_damage_ends_in_one_line(form: Form, exported: Callable[[Form], Path], tmp_path: Path) -> None:
    whole = exported(form).read_bytes()
    path = tmp_path / f"x{SUFFIXES[form]}"
    for content in (b"", b"\x80\x04.", pickle.dumps([1]), whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    os.mkfifo(path)
    assert "no plain file" in refused(path)


def say(form: Form, path: Path, out: Path, said: str) -> Path:
    """A copy of an exported file that says something else of itself."""
    if form == "safetensors":
        out.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), {KEY: said}))
    elif form == "onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {KEY: said})
        onnx.save(model, out)
    else:
        name = f"extra/{KEY}.json"
        rewrite(path, out, lambda entry, content: said.encode() if entry == name else content)
    return out


@forms
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "another"}, "agrivision export"),
        ({"version": 2}, "version 2"),
        ({"step": -1}, "-1"),
        ({"description": {"bands": ["red"]}}, "statistics"),
        ({"description": {"bands": "rgbn"}}, "no list"),
        ({"description": {"classes": ["a", "b"]}}, ""),
        ({"description": {"classes": ["a"] * 9}}, "classes"),
        ({"description": {"mean": ["1", "2", "3", "4"]}}, "finite number"),
        ({"description": {"dtype": "object"}}, "type"),
        ({"description": {"tile": 10**9}}, "whole number"),
        ({"description": {"model": {"base_channels": 10**9}}}, "whole number"),
        ({"description": {"model": {"depth": "2"}}}, "description"),
        (
            {"description": {"model": {"encoder": "resnet18", "encoder_weights": "/etc/passwd"}}},
            "other weights",
        ),
        ({"description": {"colour": "blue"}}, "colour"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_description_that_does_not_fit(
    changes: dict[str, Any],
    words: str,
    form: Form,
    exported: Callable[[Form], Path],
    original: TrainedModel,
    tmp_path: Path,
) -> None:
    said = json.loads(About.of(original).to_text())
    description = changes.get("description", {})
    model = description.get("model", {})
    said |= changes | {"description": said["description"] | description}
    said["description"]["model"] = (
        json.loads(About.of(original).to_text())["description"]["model"] | model
    )
    path = say(form, exported(form), tmp_path / f"x{SUFFIXES[form]}", json.dumps(said))
    assert words in refused(path)


@forms
def test_what_others_have_exported_says_nothing_of_bands(form: Form, tmp_path: Path) -> None:
    needs(form)
    path = tmp_path / f"x{SUFFIXES[form]}"
    if form == "safetensors":
        path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    elif form == "torch-export":
        torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), path)
    else:
        path.write_bytes(relu().SerializeToString())
    refused(path)


def relu(domain: str = "") -> Any:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, ["b", 4, "h", "w"]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], domain=domain)], "g", *zip(values)
    )
    opsets = [helper.make_opsetid(name, 18) for name in {"", domain}]
    return helper.make_model(graph, opset_imports=opsets)


def test_weights_in_another_file_are_refused(
    exported: Callable[[Form], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported("onnx")
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    onnx.save(
        onnx.load(path), "x.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )
    assert (tmp_path / "weights").stat().st_size > 0
    assert "another file" in refused(tmp_path / "x.onnx")


def test_operators_of_a_library_are_refused(tmp_path: Path, original: TrainedModel) -> None:
    onnx = pytest.importorskip("onnx")
    model = relu("somebody.else")
    onnx.helper.set_model_props(model, {KEY: About.of(original).to_text()})
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    assert "'somebody.else', which are not loaded" in refused(tmp_path / "x.onnx")


def test_a_function_of_the_file_does_not_let_a_library_in(
    tmp_path: Path, original: TrainedModel
) -> None:
    """A domain in which one function stands in the file may still be a library's."""
    onnx = pytest.importorskip("onnx")
    model = relu("somebody.else")
    helper = onnx.helper
    node = helper.make_node("Identity", ["x"], ["y"])
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("somebody.else", "Other", ["x"], ["y"], [node], opset))
    helper.set_model_props(model, {KEY: About.of(original).to_text()})
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    assert "'somebody.else', which are not loaded" in refused(tmp_path / "x.onnx")


def test_a_network_that_is_only_claimed_takes_no_memory(tmp_path: Path) -> None:
    """A checkpoint of four channels says that it is one of 16,384."""
    trained = make_run(tmp_path / "run")
    claimed = dataclasses.replace(trained.description.model, base_channels=1 << 14, depth=8)
    description = dataclasses.replace(trained.description, model=claimed)
    states = {"model": trained.module.state_dict(), "description": description.to_dict()}
    checkpoint.save(tmp_path / "other", states, step=7, epoch=1)
    with pytest.raises(CheckpointError, match="not those of the network"):
        load_run(tmp_path / "other" / "step-000000007", "cpu")


def test_something_else_than_probabilities_is_refused(tmp_path: Path, original: TrainedModel) -> None:
    onnx = pytest.importorskip("onnx")
    model = relu()
    onnx.helper.set_model_props(model, {KEY: About.of(original).to_text()})
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    assert "not the probabilities of 9 classes" in refused(tmp_path / "x.onnx")


def test_weights_of_another_network_are_refused(
    exported: Callable[[Form], Path], tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", base_channels=6)
    path = say(
        "safetensors", exported("safetensors"), tmp_path / "x.safetensors", About.of(other).to_text()
    )
    assert "not those of the network" in refused(path)


def test_an_encoder_that_is_not_there_is_named_with_its_file(
    exported: Callable[[Form], Path], tmp_path: Path
) -> None:
    trained = make_run(tmp_path / "run")
    pytest.importorskip("timm")
    description = dataclasses.replace(
        trained.description, model=dataclasses.replace(trained.description.model, encoder="resnet_34")
    )
    states = {"model": trained.module.state_dict(), "description": description.to_dict()}
    folder = checkpoint.save(tmp_path / "other", states, step=7, epoch=1)
    about = dataclasses.replace(About.of(trained), description=description).to_text()
    file = say("safetensors", exported("safetensors"), tmp_path / "x.safetensors", about)
    for path in (folder, file):
        with pytest.raises(CheckpointError, match="timm has no model 'resnet_34'") as refusal:
            load_model(path, "cpu")
        assert str(path) in str(refusal.value)


# Every network that can be trained; torch takes its time to trace one.

NETWORKS = [
    {"depth": 4, "base_channels": 4},
    {"depth": 2, "convolution": "valid"},
    {"depth": 2, "up": "bilinear", "norm": "group"},
    {"depth": 2, "norm": "none", "dropout": 0.5},
    {
        "depth": 2,
        "up": "pixel_shuffle",
        "block": "residual",
        "attention": "gate",
        "deep_supervision": 1,
    },
    {
        "depth": 1,
        "convolution": "valid",
        "up": "pixel_shuffle",
        "block": "residual",
        "attention": "gate",
    },
    {"encoder": "resnet18"},
    {"encoder": "resnet10t", "up": "pixel_shuffle", "attention": "gate", "deep_supervision": 2},
    {"encoder": "convnext_atto"},
    {"encoder": "efficientnet_b0", "up": "bilinear"},
]


@pytest.mark.faults
@pytest.mark.parametrize("form", ["torch-export", "onnx"])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: "-".join(map(str, model.values())))
def test_every_network_can_be_exported(form: Form, model: dict[str, Any], tmp_path: Path) -> None:
    needs(form)
    if "encoder" in model:
        pytest.importorskip("timm")
    original = make_run(tmp_path / "run", **model)
    out = tmp_path / f"network{SUFFIXES[form]}"
    export(original, out, form, find_samples(original, None, None, 1))
    again = load_model(out, "cpu")
    for shape in [(1, 64, 64), (3, 37, 41), (1, 3, 100)]:
        wanted, found = (each.probabilities(images(*shape)) for each in (original, again))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert (wanted.argmax(1) == found.argmax(1)).float().mean() > 0.999
