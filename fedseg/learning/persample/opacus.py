"""The same gradients for Opacus: its hooks, optimiser and accountants on top of our rules.

Opacus has no rule for transposed convolutions and PReLU, and unfolds convolutions. Registering is
for the whole process, and replaces Opacus' own convolutions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fedseg.learning.persample.rules import RULES, Rule, convolution, prelu

REGISTERED = (*(kind for kind, rule in RULES.items() if rule is convolution), nn.PReLU)


def register_grad_samplers() -> None:
    """Make Opacus use our rules; needs the package opacus."""
    from opacus.grad_sample import (
        register_grad_sampler,
    )

    for kind in REGISTERED:
        rule = prelu if kind is nn.PReLU else convolution
        register_grad_sampler(kind)(partial(_sample, rule))


def _sample(
    rule: Rule, layer: nn.Module, activations: list[Tensor], gradient: Tensor
) -> dict[nn.Parameter, Tensor]:
    """One rule in Opacus' form: each sample is a patient."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    samples = [slice(i, i + 1) for i in range(len(gradient))]
    found = rule(layer, activations[0].detach(), gradient, samples, own)
    return {own[name]: rows for name, rows in found.items()}
