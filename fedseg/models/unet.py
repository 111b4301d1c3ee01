"""The built-in U-Net: MONAI's, with norms that a per-patient gradient and a federation can bear.

Norms have affine parameters and no running statistics, in 2-D and 3-D. MONAI's group norm would
also stand on the output block, whose channels are the classes and seldom divide into the groups;
there it gets one group a channel, which is instance norm.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.unet import UNet as MonaiUNet
from torch import nn

from fedseg.network import UNetOptions
from fedseg.task import Task

Norm = tuple[str, dict[str, Any]]


class UNet(MonaiUNet):
    """MONAI's residual U-Net (Kerfoot et al., STACOM 2018) with a norm of its own at the output."""

    def __init__(self, output_norm: Norm, **settings: Any) -> None:
        self._output_norm = output_norm
        super().__init__(**settings)

    def _get_up_layer(
        self, in_channels: int, out_channels: int, strides: int, is_top: bool
    ) -> nn.Module:
        """MONAI's layer; on the output block with the output's norm."""
        hidden = self.norm
        self.norm = self._output_norm if is_top else hidden
        layer: nn.Module = super()._get_up_layer(in_channels, out_channels, strides, is_top)
        self.norm = hidden
        return layer


def build_unet(task: Task, options: UNetOptions) -> UNet:
    """Build the network; its weights come from the global generator.

    It maps (B, channels, *patch) to logits (B, 1 + labels, *patch), where every side of the patch
    is a multiple of 2 ** (levels - 1).
    """
    classes = 1 + len(task.labels)
    norm: Norm = ("instance", {"affine": True})
    output_norm = norm
    if options.norm == "group":
        norm = ("group", {"num_groups": options.groups})
        output_norm = ("group", {"num_groups": classes})
    return UNet(
        output_norm,
        spatial_dims=task.dimensions,
        in_channels=len(task.channels),
        out_channels=classes,
        channels=options.channels,
        strides=(2,) * (len(options.channels) - 1),
        num_res_units=options.residual_units,
        norm=norm,
        dropout=options.dropout,
    )
