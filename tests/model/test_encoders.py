from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from agrivision.config import ModelConfig
from agrivision.errors import ConfigurationError
from agrivision.model.build import build_model
from agrivision.model.encoders import EncoderUNet, list_encoders
from agrivision.model.padding import dense_logits


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'agrivision\[encoders\]'"):
        EncoderUNet(4, 9, encoder="resnet18")


@pytest.fixture(name="timm_weights")
def timm_weights_fixture(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(7)
    weights = timm.create_model("mobilenetv3_small_050", pretrained=False).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", weights


def load(path: Path, bands: int, encoder: str = "mobilenetv3_small_050") -> EncoderUNet:
    return EncoderUNet(bands, 3, encoder=encoder, weights=str(path), base_channels=2)


@pytest.mark.parametrize(
    "encoder", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "mambaout_femto"]
)
def test_logits_have_the_images_resolution_and_every_parameter_is_alive(encoder: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, base_channels=4, up="bilinear", dropout=0.1)
    model = build_model(config, 4, 3)
    logits = model(torch.randn(2, 4, 64, 96))
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    # Not so in the encoder: some of timm's start with residual branches multiplied by zero.
    ours = [*model.decoder.parameters(), *model.head.parameters()]
    assert all(p.grad.any() for p in ours if p.grad is not None)


@torch.no_grad()
def test_sizes() -> None:
    pytest.importorskip("timm")
    model = EncoderUNet(4, 3, encoder="mobilenetv3_small_050", base_channels=2).eval()
    assert model.input_size(1) == 32
    assert model.input_size(64) == 64
    with pytest.raises(ValueError, match="64 x 32 would"):
        model(torch.zeros(1, 4, 33, 32))
    images = torch.randn(1, 4, 64, 32)
    assert torch.equal(dense_logits(model, images), model(images))
    assert dense_logits(model, torch.randn(1, 4, 33, 7)).shape == (1, 3, 33, 7)


def test_names_are_corrected_and_never_downloaded() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match=r"did you mean.*resnet34"):
        EncoderUNet(4, 9, encoder="resnet_34")
    with pytest.raises(ConfigurationError, match="no model"):
        EncoderUNet(4, 9, encoder="hf-hub:timm/resnet18.a1_in1k")


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "coatnet_pico_rw_224", "hiera_tiny_224"])
def test_models_of_a_fixed_size_are_refused(encoder: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match="cannot be a UNet's encoder") as found:
        EncoderUNet(4, 9, encoder=encoder)
    assert "\n" not in str(found.value)


# The smallest of each family; the windows of MaxViT and Swin make theirs slow.
FAMILIES = ["resnet10t", "convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002"]
SLOW = ["maxvit_rmlp_pico_rw_256", "swin_tiny_patch4_window7_224", "efficientnet_b0", "regnety_002"]


@pytest.mark.parametrize(
    "encoder", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.faults) for name in SLOW)]
)
def test_the_stem_of_every_family_is_widened(encoder: str, tmp_path: Path) -> None:
    """From the weights of the whole model; all but the stem are taken as they are."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    save_file(timm.create_model(encoder, pretrained=False).state_dict(), tmp_path / "w.safetensors")
    three = load(tmp_path / "w.safetensors", 3, encoder).encoder.state_dict()
    for bands in (4, 6):
        model = load(tmp_path / "w.safetensors", bands, encoder)
        found = model.encoder.state_dict()
        (stem,) = [name for name in found if found[name].shape != three[name].shape]
        assert all(torch.equal(found[name], three[name]) for name in three if name != stem)
        mean, colours = three[stem].mean(1, keepdim=True), three[stem]
        wanted = torch.cat([colours, colours[:, :1], mean, mean], 1)[:, :bands] * 3 / bands
        torch.testing.assert_close(found[stem], wanted)
        with torch.no_grad():
            images = torch.randn(1, bands, model.unit, 2 * model.unit)
            assert model.eval()(images).shape == (1, 3, model.unit, 2 * model.unit)


@torch.no_grad()
def test_windows_of_a_fixed_size_ask_for_multiples_of_it() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = EncoderUNet(4, 3, encoder="maxvit_tiny_tf_224", base_channels=2)
        assert (model.reduction, model.unit, model.input_size(225)) == (32, 224, 448)
        assert model(torch.empty(1, 4, 224, 448)).shape == (1, 3, 224, 448)
        with pytest.raises(ValueError, match="448 x 224 would"):
            model(torch.empty(1, 4, 256, 224))


@torch.no_grad()
def test_models_that_can_be_told_to_take_any_size_are_told() -> None:
    """Swin's features have their channels last, and its images a fixed size unless one says so."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = EncoderUNet(4, 3, encoder="swin_tiny_patch4_window7_224", base_channels=2)
        assert model.unit == 32
        assert model(torch.empty(1, 4, 64, 160)).shape == (1, 3, 64, 160)


def test_the_way_up_has_the_options_of_the_unet() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="resnet10t",
        base_channels=4,
        block="residual",
        attention="gate",
        up="pixel_shuffle",
        deep_supervision=3,
    )
    model = build_model(config, 5, 3)
    images = torch.randn(2, 5, 64, 32)
    logits = model(images)
    assert [tuple(each.shape) for each in logits] == [
        (2, 3, 64 >> level, 32 >> level) for level in range(4)
    ]
    torch.stack([each.square().mean() for each in logits]).sum().backward()
    ours = [(name, p) for name, p in model.named_parameters() if not name.startswith("encoder.")]
    assert [name for name, p in ours if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        assert isinstance(model.eval()(images), Tensor)
    with pytest.raises(ConfigurationError, match=r"model\.deep_supervision is 5.* has 4 coarser"):
        EncoderUNet(4, 9, encoder="resnet10t", deep_supervision=5)


def test_those_that_fit_are_listed() -> None:
    pytest.importorskip("timm")
    assert dict(list_encoders("resnet1[048]t")) == {"resnet10t": 32, "resnet14t": 32}
    assert [name for name, _ in list_encoders("coatnet_pico")] == []
    assert dict(list_encoders("maxvit_tiny_tf_384")) == {"maxvit_tiny_tf_384": 384}


def test_weights_for_as_many_bands_are_taken_as_they_are(
    timm_weights: tuple[Path, dict[str, Tensor]],
) -> None:
    path, weights = timm_weights
    loaded = load(path, 3).encoder.state_dict()
    assert loaded
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


@pytest.mark.parametrize("bands", [1, 2, 4, 6])
def test_the_stem_is_widened(timm_weights: tuple[Path, dict[str, Tensor]], bands: int) -> None:
    path, weights = timm_weights
    loaded = load(path, bands).encoder.state_dict()["conv_stem.weight"] * bands / 3
    stem = weights["conv_stem.weight"]
    mean = stem.mean(1)
    sources = (
        [stem[:, 0], stem[:, 1], stem[:, 2], stem[:, 0], mean, mean] if bands > 3 else [mean] * bands
    )
    torch.testing.assert_close(loaded, torch.stack(sources[:bands], 1))


def test_grey_images_keep_their_activations(timm_weights: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = timm_weights
    grey = torch.randn(1, 1, 8, 8)
    convolve = torch.nn.functional.conv2d
    one = convolve(grey, load(path, 1).encoder.state_dict()["conv_stem.weight"])
    three = convolve(grey.expand(-1, 3, -1, -1), weights["conv_stem.weight"])
    torch.testing.assert_close(one, three)


def test_renamed_modules_find_their_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model("convnext_atto", pretrained=False).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load(tmp_path / "w.safetensors", 3, "convnext_atto").encoder.state_dict()
    key = "stages_1.blocks.0.conv_dw.weight"
    assert torch.equal(loaded[key], weights["stages.1.blocks.0.conv_dw.weight"])


def test_weights_that_do_not_fit_are_refused(timm_weights: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = timm_weights
    damaged = {k: v for k, v in weights.items() if not k.startswith("blocks.2")} | {
        "foo": torch.ones(1)
    }
    save_file(damaged, path)
    with pytest.raises(ConfigurationError, match=r"missing blocks\.2.* and \d+ more; unexpected foo$"):
        load(path, 4)
    save_file(weights | {"bn1.weight": torch.ones(3)}, path)
    with pytest.raises(ConfigurationError, match=r"another shape bn1\.weight \(3,\)$"):
        load(path, 4)
    with pytest.raises(ConfigurationError, match="does not fit resnet18"):
        load(path, 4, "resnet18")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match="cannot read"):
        load(tmp_path / "absent.safetensors", 4)
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigurationError, match="cannot read"):
        load(tmp_path / "damaged.safetensors", 4)
