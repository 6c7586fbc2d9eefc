"""From the configuration to a network."""

from __future__ import annotations

from agrivision.config import ModelConfig
from agrivision.model.encoders import EncoderUNet
from agrivision.model.unet import UNet


def build_model(config: ModelConfig, bands: int, classes: int) -> UNet | EncoderUNet:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        config: which network. For weights that come from a checkpoint, replace `encoder_weights`
            by None: the file is read here, and need not exist where the checkpoint is used.
        bands: channels of the images, indices that follow the bands included.
        classes: of the logits.

    Raises:
        ConfigurationError: the encoder or its weights cannot be used.
    """
    if config.encoder is not None:
        return EncoderUNet(
            bands,
            classes,
            encoder=config.encoder,
            weights=config.encoder_weights,
            base_channels=config.base_channels,
            up=config.up,
            norm=config.norm,
            block=config.block,
            attention=config.attention,
            dropout=config.dropout,
            deep_supervision=config.deep_supervision,
        )
    return UNet(
        bands,
        classes,
        base_channels=config.base_channels,
        depth=config.depth,
        convolution=config.convolution,
        up=config.up,
        norm=config.norm,
        block=config.block,
        attention=config.attention,
        dropout=config.dropout,
        deep_supervision=config.deep_supervision,
    )
