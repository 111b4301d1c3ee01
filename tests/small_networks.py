"""Small networks with each kind of layer, and per-patient gradients by plain autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedseg.models.standardised import StandardisedConv2d, StandardisedConv3d
from fedseg.models.unet import build_unet
from fedseg.network import UNetOptions
from fedseg.task import Task

PATIENTS = torch.tensor([4, 1, 4, 9, 1, 4])  # 3, 2 and 1 samples, mixed up


class Scaled(nn.Module):
    """Bare parameters that broadcast in different ways, beside a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(4, 1, 1))
        self.place = nn.Parameter(torch.rand(1, 4, 8, 8))
        self.tone = nn.Parameter(torch.rand(()))
        self.row = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x) * self.gain + self.place * self.tone + self.row)


class Strange(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.power[:, None, None]) + self.power.sum()


class Tied(nn.Module):
    """One layer used twice, and one parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.second(self.act(self.first(self.first(x))))))


class Tokens(nn.Module):
    """An embedding and a position."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.place = nn.Parameter(torch.rand(1, 5, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.words(x.abs().mul(10).long() % 7) + self.place
        return cast(Tensor, self.head(self.norm(spread)))


def _flat(layer: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Conv2d(4, 2, 1)), (2, 8, 8)


def _solid(layer: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), layer, nn.Conv3d(4, 2, 1)), (1, 4, 5, 6)


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks and the shape of one sample, by the kind of layer that each is about."""
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    frozen = nn.GroupNorm(2, 4)
    frozen.bias.requires_grad_(False)
    partly = nn.Conv2d(4, 4, 3, padding=1)
    partly.weight.requires_grad_(False)
    return {
        "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2)), (2, 9)),
        "conv2d strided": _flat(nn.Conv2d(4, 4, (3, 2), stride=2, padding=1, dilation=(1, 2))),
        "conv2d grouped": _flat(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)),
        "conv2d same": _flat(nn.Conv2d(4, 4, (4, 3), padding="same")),
        "conv2d circular": _flat(circular),
        "conv2d bias alone": _flat(partly),
        "conv2d standardised": _flat(StandardisedConv2d(4, 4, 3, padding=1)),
        "conv3d standardised": _solid(StandardisedConv3d(4, 4, 3, padding=1, groups=2)),
        "conv3d": _solid(nn.Conv3d(4, 4, 3, stride=(1, 2, 2), padding=1)),
        "transposed 1d": (nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2)), (2, 9)),
        "transposed 2d": _flat(nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=2)),
        "transposed 3d": _solid(nn.ConvTranspose3d(4, 4, 3, 2, 1, output_padding=1)),
        "linear": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), (5,)),
        "linear over tokens": (nn.Sequential(nn.Linear(5, 4, bias=False)), (3, 2, 5)),
        "instance norm 1d": (nn.Sequential(nn.InstanceNorm1d(3, affine=True)), (3, 7)),
        "instance norm 2d": _flat(nn.InstanceNorm2d(4, affine=True)),
        "instance norm 3d": _solid(nn.InstanceNorm3d(4, affine=True)),
        "group norm": _flat(nn.GroupNorm(2, 4)),
        "group norm, half frozen": _flat(frozen),
        "layer norm": _flat(nn.LayerNorm((8, 8))),
        "layer norm without bias": _flat(nn.LayerNorm(8, bias=False)),
        "prelu": _flat(nn.PReLU()),
        "prelu per channel": _solid(nn.PReLU(4)),
        "prelu after linear": (nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), (5,)),
        "embedding": (Tokens(), (5,)),
        "bare parameters": _flat(Scaled()),
        "unknown": _flat(Strange()),
        "tied": _flat(Tied()),
        "relu in place": _flat(nn.Sequential(nn.ReLU(inplace=True), nn.GroupNorm(2, 4))),
    }


def unet(dimensions: int, norm: str, units: int, **more: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """One of our networks, and the shape of one sample."""
    task = SimpleNamespace(labels={1: "a", 2: "b"}, channels=["x", "y"], dimensions=dimensions)
    options = UNetOptions.model_validate(
        {"channels": (4, 8, 16), "norm": norm, "groups": 4, "residual_units": units, **more}
    )
    sides = (16, 8) if dimensions == 2 else (8, 8, 4)
    return build_unet(cast(Task, task), options), (2, *sides)


def batch(
    network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, samples: int = len(PATIENTS)
) -> tuple[Tensor, Tensor]:
    """Random inputs, and targets in the output's shape."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = network(inputs.to(next(network.parameters()).dtype))
    targets = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), targets.to(dtype)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss for each sample, in the outputs' own type."""
    smooth = functional.smooth_l1_loss(outputs, targets, reduction="none")
    return (smooth + outputs.sigmoid() * targets.sin()).flatten(1).mean(1)


def alone(network: nn.Module, data: tuple[Tensor, Tensor], patients: Tensor) -> dict[str, Tensor]:
    """Gradients (patients, *parameter) by autograd, each patient by itself."""
    rows = []
    for patient in patients.unique():
        own = patients == patient
        network.zero_grad()
        loss(network(data[0][own]), data[1][own]).mean().backward()
        rows.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in network.named_parameters()
                if p.requires_grad
            }
        )
    network.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest distance of a patient's gradients over their norm, in float64."""
    zeros = {name: torch.zeros_like(rows) for name, rows in others.items()}
    apart = _norms(
        {name: {**zeros, **some}[name].double() - others[name].double() for name in others}
    )
    return float((apart / _norms(others)).max())


def _norms(rows: dict[str, Tensor]) -> Tensor:
    """The norm of each patient's gradients, in float64."""
    flat = [part.double().reshape(len(part), -1) for part in rows.values()]
    return torch.cat(flat, 1).norm(dim=1)
