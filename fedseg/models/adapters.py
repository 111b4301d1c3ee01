"""Low-rank adapters: a small trained update beside each large weight, which itself stays frozen.

An adapted layer computes `base(x) + up(down(x))`: `down` is a layer of the base's own kind, kernel,
stride and padding with few output channels, `up` mixes these into the base's outputs point by point
(LoRA, Hu et al., ICLR 2022, arXiv 2106.09685; for convolutions as LoCon). `up` begins at zero, so
that an adapted network first computes what the plain one did. Both parts are plain layers, so that
they have per-patient gradients like any other. Together they are one weight of the base's shape:
`merged` folds them in, and what is left is the plain network.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedseg.errors import PlanError

POINTWISE: dict[type[nn.Module], type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    nn.Conv1d: nn.Conv1d, nn.Conv2d: nn.Conv2d, nn.Conv3d: nn.Conv3d,
    nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d, nn.ConvTranspose3d: nn.Conv3d,
}  # fmt: skip
"""The convolution that mixes channels in as many dimensions. By exact type, as in `adapt`."""


class Adapted(nn.Module):
    """A frozen layer and its low-rank update.

    Attributes:
        base: as it was, its parameters frozen.
        down: of the base's kind without a bias, `rank` output channels for each group.
        up: (rank -> outputs) for each group, pointwise, without a bias, zero at first.
    """

    def __init__(self, base: _ConvNd | nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        like: Any = {"device": base.weight.device, "dtype": base.weight.dtype}
        if isinstance(base, nn.Linear):
            self.down: nn.Module = nn.Linear(base.in_features, rank, bias=False, **like)
            self.up: nn.Module = nn.Linear(rank, base.out_features, bias=False, **like)
        else:
            self.down = _narrowed(base, rank, like)
            mixes = POINTWISE[type(base)]
            inner = rank * base.groups
            self.up = mixes(inner, base.out_channels, 1, groups=base.groups, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, input: Tensor) -> Tensor:
        """What the base gives, and its update."""
        output: Tensor = self.base(input) + self.up(self.down(input))
        return output

    def folded(self) -> Tensor:
        """The weight of base and update together, float64, in the base's shape."""
        base = self.base
        down, up = (cast(Tensor, part.weight).detach().double() for part in (self.down, self.up))
        weight = base.weight.detach().double()
        if isinstance(base, nn.Linear):
            return weight + up @ down
        groups = base.groups
        mixing = up.view(groups, base.out_channels // groups, -1)  # (group, out, rank)
        if isinstance(base, _ConvTransposeNd):  # weights (in, rank, *kernel), inputs by group
            rows = down.view(groups, base.in_channels // groups, *down.shape[1:])
            update = torch.einsum("gor,gir...->gio...", mixing, rows)
        else:  # weights (group x rank, in, *kernel)
            rows = down.view(groups, -1, *down.shape[1:])
            update = torch.einsum("gor,gr...->go...", mixing, rows)
        return weight + update.reshape(weight.shape)


def adapt(
    network: nn.Module,
    rank: int,
    *,
    train_down: bool = True,
    leave: Collection[nn.Module] = (),
) -> tuple[str, ...]:
    """Give the large layers of a network an adapter, in place; the network computes what it did.

    Adapted is every convolution, transposed convolution and linear layer, by exact type (a subclass
    may use its weight otherwise), whose weight has more numbers than its adapter would, and belongs
    to no other layer. `down` is drawn from torch's global generator as its kind of layer draws.

    Args:
        network: plain; its layers keep their names, and their tensors move to `NAME.base`.
        rank: channels between `down` and `up`, for each group.
        train_down: False freezes `down` as drawn; only `up` is then trained.
        leave: layers that get none, for example a head that is trained itself.

    Returns:
        The names of the adapted layers, in the network's order.

    Raises:
        PlanError: no layer is large enough; nothing was changed.
    """
    uses = [id(p) for m in network.modules() for p in m._parameters.values() if p is not None]
    layers = {
        id(layer): (name, layer)
        for name, layer in network.named_modules()
        if name and layer not in leave and _gains(layer, rank) and uses.count(id(layer.weight)) == 1
    }
    if not layers:
        raise PlanError(
            f"model.adapters: no layer of the network has more weights than an adapter of rank "
            f"{rank} would: lower the rank, or remove model.adapters and train another part"
        )
    adapted = {key: Adapted(layer, rank) for key, (_, layer) in layers.items()}
    for parent in list(network.modules()):
        for local, child in parent._modules.items():
            if id(child) in adapted:
                parent._modules[local] = adapted[id(child)]
    for layer in adapted.values():
        layer.train(layer.base.training)
        layer.down.requires_grad_(train_down)
    return tuple(name for name, _ in layers.values())


def merged(network: nn.Module) -> nn.Module:
    """A plain copy of an adapted network that computes the same, its adapters folded into weights.

    The fold is in float64 and rounded once; the copy has the names and shapes of the network before
    `adapt`. What was frozen for the adapters' sake takes gradients again.
    """
    plain = deepcopy(network)
    layers = list(plain.modules())
    for layer in layers:
        if isinstance(layer, Adapted):
            layer.base.weight.data.copy_(layer.folded())
            layer.base.requires_grad_(True)
    for parent in layers:
        for local, child in parent._modules.items():
            if isinstance(child, Adapted):
                parent._modules[local] = child.base
    return plain


def base_names(network: nn.Module) -> dict[str, str]:
    """Tensors that a plain network has, too: name in the adapted network -> name in the plain."""
    inserted = {f"{n}." for n, m in network.named_modules() if isinstance(m, Adapted)}
    found = {}
    for name in network.state_dict():
        layer = next((start for start in inserted if name.startswith(start)), None)
        if layer is None:
            found[name] = name
        elif name.startswith(f"{layer}base."):
            found[name] = layer + name.removeprefix(f"{layer}base.")
    return found


def _gains(layer: nn.Module, rank: int) -> bool:
    """Whether an adapter of this layer has fewer parameters than its weight."""
    if type(layer) is nn.Linear:
        inputs, outputs, kernel = layer.in_features, layer.out_features, 1
    elif type(layer) in POINTWISE:
        assert isinstance(layer, _ConvNd)
        inputs, outputs = layer.in_channels, layer.out_channels
        kernel = layer.weight[0, 0].numel()
    else:
        return False
    return rank * (inputs * kernel + outputs) < layer.weight.numel()


def _narrowed(base: _ConvNd, rank: int, like: dict[str, Any]) -> _ConvNd:
    """A convolution like another, with `rank` output channels for each group and no bias."""
    more: dict[str, Any] = {"padding_mode": base.padding_mode, **like}
    if isinstance(base, _ConvTransposeNd):
        more["output_padding"] = base.output_padding
    return type(base)(
        base.in_channels, rank * base.groups, base.kernel_size,
        stride=base.stride, padding=base.padding, dilation=base.dilation,
        groups=base.groups, bias=False, **more,
    )  # fmt: skip
