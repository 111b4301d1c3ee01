"""The gradient of one layer's parameters, patient by patient, from its input and output gradient.

A batch holds samples (patches); each patient's lie side by side, and a patient is a slice of them.
A rule gets a layer's input, the loss' gradient at its output and those slices, and returns for each
wanted parameter a tensor (patients, *parameter): what autograd would give for that patient alone.
The sum over a patient's samples is taken here, before anybody looks at a norm.

Convolutions ask torch for the weight gradient of one patient at a time: the plain backward's
arithmetic, with neither the memory of unfolding (Opacus) nor grouped convolutions (functorch).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedseg.learning.persample.unfolded import unfolded
from fedseg.models.standardised import StandardisedConv2d, StandardisedConv3d, standardise

ONE_DNN_FROM = 20480  # torch's own bound on batch x channels x the first two sides
FEW_POSITIONS = 64

Patients = Sequence[slice]
Gradients = dict[str, Tensor]
Wanted = Collection[str]
Rule = Callable[[nn.Module, Tensor, Tensor, Patients, Wanted], Gradients]


class UnsupportedLayerError(Exception):
    """No per-patient gradient of this layer in a batch; the loop over patients still works."""


def sum_samples(gradient: Tensor, patients: Patients) -> Tensor:
    """Sum a gradient (samples, ...) over each patient's samples: (patients, ...)."""
    if len(patients) == len(gradient) and all(p.stop - p.start == 1 for p in patients):
        return gradient
    return torch.stack([gradient[patient].sum(0) for patient in patients])


def convolution(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Convolutions and transposed convolutions in 1-D to 3-D, any padding, stride and groups."""
    assert isinstance(layer, _ConvNd)
    if x.ndim != layer.weight.ndim:
        raise UnsupportedLayerError("was given an image without a batch axis")
    if any(more >= step for more, step in zip(layer.output_padding, layer.stride, strict=True)):
        raise UnsupportedLayerError("pads its output by a stride or more")
    found: Gradients = {}
    if "weight" in wanted:
        found["weight"] = _weight_gradients(layer, x.to(gradient.dtype), gradient, patients)
    if layer.bias is not None and "bias" in wanted:
        found["bias"] = sum_samples(gradient.flatten(2).sum(2), patients).to(layer.bias.dtype)
    return found


def standardised_convolution(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Weight-standardised convolutions: the plain rule, pulled back through the standardisation."""
    found = convolution(layer, x, gradient, patients, wanted)
    if "weight" in found:
        assert isinstance(layer, StandardisedConv2d | StandardisedConv3d)
        with torch.enable_grad():
            weight = layer.weight.detach().requires_grad_()
            used = standardise(weight, layer.eps)
            rows = [
                torch.autograd.grad(used, weight, row, retain_graph=True)[0]
                for row in found["weight"]
            ]
        found["weight"] = torch.stack(rows)
    return found


def linear(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Linear layers over the last axis."""
    assert isinstance(layer, nn.Linear)
    found: Gradients = {}
    if "weight" in wanted:
        x = x.to(gradient.dtype)
        rows = [gradient[p].flatten(0, -2).mT @ x[p].flatten(0, -2) for p in patients]
        found["weight"] = torch.stack(rows).to(layer.weight.dtype)
    if layer.bias is not None and "bias" in wanted:
        bias = gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1)
        found["bias"] = sum_samples(bias, patients).to(layer.bias.dtype)
    return found


def layer_norm(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Layer norm; its input is normalised once more."""
    assert isinstance(layer, nn.LayerNorm)
    shape = layer.normalized_shape
    found: Gradients = {}
    for name, parameter in layer.named_parameters(recurse=False):
        if name in wanted:
            part = gradient
            if name == "weight":
                part = gradient * functional.layer_norm(x, shape, eps=layer.eps)
            samples = part.reshape(len(x), -1, *shape).sum(1)
            found[name] = sum_samples(samples, patients).to(parameter.dtype)
    return found


def embedding(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Embeddings; the padding index gets nothing, as in torch."""
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise UnsupportedLayerError("is an embedding with max_norm or scale_grad_by_freq")
    rows = torch.zeros(
        len(patients), *layer.weight.shape, dtype=layer.weight.dtype, device=x.device
    )
    for row, patient in zip(rows, patients, strict=True):
        row.index_add_(0, x[patient].flatten(), gradient[patient].flatten(0, -2).to(row.dtype))
    if layer.padding_idx is not None:
        rows[:, layer.padding_idx] = 0
    return {"weight": rows}


def prelu(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """PReLU by hand, for Opacus, which has no folded layers."""
    assert isinstance(layer, nn.PReLU)
    part = (x.clamp(max=0) * gradient).reshape(len(x), layer.num_parameters, -1)
    if layer.num_parameters > 1:
        return {"weight": sum_samples(part.sum(2), patients)}
    return {"weight": sum_samples(part.flatten(1).sum(1, keepdim=True), patients)}


def alone(
    layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients, wanted: Wanted
) -> Gradients:
    """Any layer without parts: run again for each patient by itself, with one backward each."""
    own = {n: p for n, p in layer.named_parameters(recurse=False) if n in wanted}
    rows: dict[str, list[Tensor]] = {name: [] for name in own}
    for patient in patients:
        with torch.enable_grad():
            copies = {name: p.detach().requires_grad_() for name, p in own.items()}
            output = functional_call(layer, copies, (x[patient],))
            found = torch.autograd.grad(
                output, list(copies.values()), gradient[patient], allow_unused=True
            )
        for (name, copy), part in zip(copies.items(), found, strict=True):
            rows[name].append(torch.zeros_like(copy) if part is None else part)
    return {name: torch.stack(parts) for name, parts in rows.items()}


RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(
        (
            nn.Conv1d, nn.Conv2d, nn.Conv3d,
            nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        ),
        convolution,
    ),
    StandardisedConv2d: standardised_convolution,
    StandardisedConv3d: standardised_convolution,
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
}  # fmt: skip
"""By exact type: a subclass may compute something else."""


def _weight_gradients(layer: _ConvNd, x: Tensor, gradient: Tensor, patients: Patients) -> Tensor:
    """The weight's gradients (patients, *weight), in its own type."""
    padding = layer.padding
    if isinstance(layer, _ConvTransposeNd):
        # a transposed convolution is the convolution from its output to its input
        x, gradient = gradient, x
    elif isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
        padding = (0,) * (x.ndim - 2)
    weight = layer.weight.detach().to(gradient.dtype)
    count = len(patients)
    if _better_in_groups(x, gradient, patients):
        together = weight.new_empty(count * weight.shape[0], *weight.shape[1:])  # its shape counts
        found = _backward(
            x.reshape(1, -1, *x.shape[2:]), gradient.reshape(1, -1, *gradient.shape[2:]),
            together, layer, padding, count * layer.groups,
        )  # fmt: skip
        return found.view(count, *weight.shape).to(layer.weight.dtype)
    if _better_unfolded(x, gradient, patients, layer):
        assert isinstance(padding, tuple)
        seen = unfolded(x, gradient.shape[2:], layer, padding)
        found = gradient.flatten(2) @ seen.mT
        return found.view(count, *weight.shape).to(layer.weight.dtype)
    if count == 1:
        whole = _backward(
            x[patients[0]], gradient[patients[0]], weight, layer, padding, layer.groups
        )
        return whole.to(layer.weight.dtype)[None]
    rows = layer.weight.new_empty(count, *weight.shape)
    for row, patient in zip(rows, patients, strict=True):
        row.copy_(_backward(x[patient], gradient[patient], weight, layer, padding, layer.groups))
    return rows


def _better_in_groups(x: Tensor, gradient: Tensor, patients: Patients) -> bool:
    """True where torch would leave oneDNN for a single sample, which is up to ten times slower.

    One grouped convolution over all samples, each a group, stays there. At few positions the
    groups themselves are slow.
    """
    small = x[0].shape[:3].numel() <= ONE_DNN_FROM and gradient[0, 0].numel() > FEW_POSITIONS
    return x.device.type == "cpu" and small and len(patients) == len(x) > 1


def _better_unfolded(x: Tensor, gradient: Tensor, patients: Patients, layer: _ConvNd) -> bool:
    """True where one product of matrices for each sample is all the work, and nothing is copied."""
    few = gradient[0, 0].numel() <= FEW_POSITIONS and len(patients) == len(x) > 1
    return x.device.type == "cpu" and few and layer.groups == 1


def _backward(
    x: Tensor, gradient: Tensor, weight: Tensor, layer: _ConvNd, padding: object, groups: int
) -> Tensor:
    """The weight's gradient of some samples together, and nothing else."""
    sides = x.ndim - 2
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, layer.stride, padding, layer.dilation, False, [0] * sides,
        groups, [False, True, False],
    )[1]  # fmt: skip
    return found
