"""The options of the network beside the paper's: each learns, and changes nothing by default."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agrivision.config import ModelConfig
from agrivision.errors import ConfigurationError
from agrivision.model.blocks import Residual, convolution_pair, initialise
from agrivision.model.build import build_model
from agrivision.model.expansion import Expansion, Gate, SubPixel
from agrivision.model.folding import folded
from agrivision.model.padding import dense_logits
from agrivision.model.unet import UNet

BLOCKS = ("plain", "residual")
UPS = ("transposed", "bilinear", "pixel_shuffle")
ATTENTIONS = ("none", "gate")
NORMS = ("batch", "group", "none")
EVERYTHING = {"block": "residual", "attention": "gate", "up": "pixel_shuffle", "deep_supervision": 1}


def network(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return build_model(ModelConfig(**({"base_channels": 8, "depth": 2} | options)), 5, 3)


@pytest.mark.parametrize(("block", "up", "attention"), [*itertools.product(BLOCKS, UPS, ATTENTIONS)])
@pytest.mark.parametrize("convolution", ["same", "valid"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_combination_has_its_shapes_and_no_dead_parameter(
    convolution: str, norm: str, block: str, up: str, attention: str
) -> None:
    """In training and in evaluation, with kernels that give the same bits every time."""
    levels = 1 if convolution == "same" else 0
    model = network(
        convolution=convolution,
        norm=norm,
        block=block,
        up=up,
        attention=attention,
        deep_supervision=levels,
        dropout=0.1,
    )
    height, width = model.input_size(12), model.input_size(20)
    images = torch.randn(2, 5, height, width)
    torch.use_deterministic_algorithms(True)
    try:
        found = model(images)
        logits = found if levels else (found,)
        assert isinstance(logits, tuple) and len(logits) == 1 + levels
        torch.stack([each.square().mean() for each in logits]).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for level, each in enumerate(logits):
        rows, columns = height - model.margin, width - model.margin
        assert each.shape == (2, 3, rows >> level, columns >> level)
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    with torch.no_grad():
        evaluated = model.eval()(images)
    assert isinstance(evaluated, Tensor) and evaluated.shape == logits[0].shape


def before(base: int, depth: int) -> nn.ModuleDict:
    """The plain network with batch normalisation, its layers made and drawn one after the other."""

    def pair(many: int, few: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(many, few, 3, padding=1, bias=False),
            nn.BatchNorm2d(few),
            nn.ReLU(),
            nn.Conv2d(few, few, 3, padding=1, bias=False),
            nn.BatchNorm2d(few),
            nn.ReLU(),
        )

    widths = [base << level for level in range(depth + 1)]
    contract = nn.ModuleList(pair(a, b) for a, b in itertools.pairwise([5, *widths]))
    expand = nn.ModuleList()
    for width in reversed(widths[:-1]):
        up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        expand.append(nn.ModuleDict({"up": up, "merge": pair(2 * width, width)}))
    made = nn.ModuleDict({"contract": contract, "expand": expand, "head": nn.Conv2d(base, 3, 1)})
    for layer in made.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
        elif isinstance(layer, nn.Conv2d):
            gain = 1.0 if layer.kernel_size == (1, 1) else 2.0
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=gain**0.5 / fan_in**0.5)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return made


def test_the_default_is_the_network_that_it_always_was() -> None:
    """The names, their order and the bits that a seed gives: checkpoints and runs rely on them."""
    torch.manual_seed(11)
    wanted = before(8, 3).state_dict()
    found = network(11, depth=3).state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_a_residual_block_adds_to_what_comes_in() -> None:
    torch.manual_seed(0)
    for before_, after in ((4, 4), (4, 6)):
        block = Residual(before_, after, convolution="same", norm="none")
        features = torch.randn(1, before_, 6, 6)
        nn.init.zeros_(block.pair[-1].weight)
        nn.init.zeros_(block.pair[-1].bias)
        assert torch.equal(block(features), block.shortcut(features).relu())
        assert isinstance(block.shortcut, nn.Identity) == (before_ == after)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_middle_of_a_padded_block_is_the_block_without_padding(norm: str) -> None:
    """The shortcut is cut where the convolutions are."""
    torch.manual_seed(0)
    padded = Residual(4, 6, convolution="same", norm=norm).eval()  # type: ignore[arg-type]
    bare = Residual(4, 6, convolution="valid", norm=norm).eval()  # type: ignore[arg-type]
    bare.load_state_dict(padded.state_dict())
    features = torch.randn(1, 4, 11, 9)
    torch.testing.assert_close(bare(features), padded(features)[..., 2:-2, 2:-2])


@torch.no_grad()
def test_residual_features_keep_their_magnitude() -> None:
    torch.manual_seed(0)
    model = UNet(4, 9, base_channels=32, depth=3, norm="none", block="residual", up="pixel_shuffle")
    logits = model(torch.randn(2, 4, 64, 64))
    assert isinstance(logits, Tensor)
    assert 0.2 < logits.std() < 5


@torch.no_grad()
def test_pixel_shuffle_begins_without_a_chequerboard() -> None:
    """As a convolution whose pixels are repeated, and with the magnitude of its input."""
    torch.manual_seed(0)
    layer = SubPixel(32, 16)
    initialise(layer)
    features = torch.randn(2, 32, 24, 24)
    found = layer(features)
    assert found.shape == (2, 16, 48, 48)
    once = nn.functional.conv2d(features, layer.project.weight[::4], padding=1)
    torch.testing.assert_close(found, once.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert 0.8 < found.std() < 1.2


@torch.no_grad()
def test_pixel_shuffle_places_the_four_kernels() -> None:
    layer = SubPixel(1, 2)
    nn.init.zeros_(layer.project.weight)
    assert layer.project.bias is not None
    layer.project.bias.copy_(torch.arange(8.0))
    found = layer(torch.zeros(1, 1, 2, 2))[0]
    assert found[0].tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]] * 2
    assert found[1].tolist() == [[4, 5, 4, 5], [6, 7, 6, 7]] * 2


@torch.no_grad()
def test_a_gate_weighs_between_none_and_all() -> None:
    torch.manual_seed(0)
    gate = Gate(6, 8)
    initialise(gate)
    skip, deep = torch.rand(2, 6, 8, 12) + 0.5, torch.randn(2, 8, 4, 6)
    share = gate(skip, deep) / skip
    assert ((share > 0) & (share < 1)).all()
    assert (share.amax(1) - share.amin(1)).max() < 1e-5  # one weight for all channels of a pixel
    assert share.median() > 0.8  # open to begin with
    assert gate.weight.bias is not None
    for bias, passed in ((-100.0, torch.zeros_like(skip)), (100.0, skip)):
        nn.init.constant_(gate.weight.bias, bias)
        torch.testing.assert_close(gate(skip, deep), passed)


@torch.no_grad()
def test_an_open_gate_changes_nothing() -> None:
    torch.manual_seed(0)
    gated = Expansion(8, 4, 4, up="transposed", norm="batch", attention="gate").eval()
    bare = Expansion(8, 4, 4, up="transposed", norm="batch").eval()
    assert gated.gate is not None and gated.gate.weight.bias is not None
    nn.init.constant_(gated.gate.weight.bias, 100.0)
    bare.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("gate.")})
    deep, skip = torch.randn(1, 8, 4, 6), torch.randn(1, 4, 8, 12)
    assert torch.equal(gated(deep, skip), bare(deep, skip))
    assert Expansion(8, 0, 4, up="transposed", norm="batch", attention="gate").gate is None


def test_coarse_heads_change_nothing_but_training() -> None:
    """The same weights with and without them, apart from the heads; the main logits come first."""
    alone, helped = network(depth=3), network(depth=3, deep_supervision=2)
    extra = {name for name in helped.state_dict() if name.startswith("coarse.")}
    assert len(extra) == 4
    helped.load_state_dict(alone.state_dict(), strict=False)
    images = torch.randn(2, 5, 16, 24)
    main, half, quarter = helped(images)
    assert [tuple(each.shape[2:]) for each in (main, half, quarter)] == [(16, 24), (8, 12), (4, 6)]
    assert torch.equal(main, alone(images))
    with torch.no_grad():
        assert torch.equal(helped.eval()(images), alone.eval()(images))


def test_the_logits_of_a_level_reach_what_is_below_it_only() -> None:
    model = network(depth=3, deep_supervision=2)
    model(torch.randn(2, 5, 16, 16))[2].square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in reached if name.startswith("expand.")} == {"0"}
    assert {name for name in reached if name.startswith(("head", "coarse"))} == {
        "coarse.1.weight",
        "coarse.1.bias",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"deep_supervision": -1}, "at least 0"),
        ({"deep_supervision": 4}, "has 3 coarser levels"),
        ({"depth": 1, "deep_supervision": 1}, "has 0 coarser levels"),
        ({"deep_supervision": 1, "convolution": "valid"}, "`valid`"),
    ],
)
def test_levels_that_there_are_not_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^model\.deep_supervision") as found:
        ModelConfig(**options)
    assert said in str(found.value)
    if options["deep_supervision"] > 0:  # whoever builds it by hand is told, too
        with pytest.raises(ConfigurationError, match=r"^model\.deep_supervision"):
            UNet(4, 9, base_channels=1, **options)


@torch.no_grad()
@pytest.mark.parametrize("up", UPS)
@pytest.mark.parametrize("depth", [1, 2])
def test_without_padding_the_size_is_the_smallest_that_gives_the_output(up: str, depth: int) -> None:
    with torch.device("meta"):
        model = UNet(1, 1, base_channels=1, depth=depth, convolution="valid", up=up, norm="none")  # type: ignore[arg-type]
        gives = {}
        for side in range(1, 90):
            with contextlib.suppress(ValueError):
                logits = model(torch.empty(1, 1, side, side))
                assert isinstance(logits, Tensor)
                gives[side] = logits.shape[-1]
    assert len(gives) > 2
    assert all(side - got == model.margin for side, got in gives.items())
    for output in range(1, max(gives.values())):
        assert model.input_size(output) == min(side for side, got in gives.items() if got >= output)


@torch.no_grad()
@pytest.mark.parametrize("convolution", ["same", "valid"])
def test_normalisation_folds_into_every_convolution(convolution: str) -> None:
    options = EVERYTHING | {"deep_supervision": 1 if convolution == "same" else 0}
    model = network(convolution=convolution, **options).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    images = torch.randn(1, 5, 13, 22)
    bare = folded(model)
    assert not [layer for layer in bare.modules() if isinstance(layer, nn.BatchNorm2d)]
    wanted = dense_logits(model, images)
    assert wanted.shape == (1, 3, 13, 22)
    torch.testing.assert_close(dense_logits(bare, images), wanted, rtol=1e-3, atol=1e-4)


def test_a_block_is_a_convolution_pair_and_a_shortcut() -> None:
    torch.manual_seed(0)
    pair = convolution_pair(4, 6, convolution="same", norm="batch")
    block = Residual(4, 6, convolution="same", norm="batch")
    names = {f"pair.{name}" for name in pair.state_dict()}
    assert names == {name for name in block.state_dict() if name.startswith("pair.")}
