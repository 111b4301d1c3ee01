"""Whether a network and a loss have per-patient gradients at all, found by a real backward.

Looking at layer types misses what a hospital's own network computes. So the network is run: no
sample's output or loss may depend on another sample's input, and the gradients of a batch must be
those of each patient alone. What mixes patients is refused with the layer's name and the remedy;
what only lacks a rule takes the loop over patients.

A head, a gate or an adapter that begins at zero hides what lies before it until it is trained. So
the weights are moved a little for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.errors import PlanError
from fedseg.learning.persample.gradients import (
    Batch,
    Loss,
    Method,
    Work,
    gradients,
    losses_of,
    work_of,
)
from fedseg.learning.persample.rules import Gradients, UnsupportedLayerError
from fedseg.learning.persample.watch import out_of_place, remarks_on
from fedseg.models.zoo import refuse_running_statistics

TOLERANCE = 1e-3
MOVED = 0.05  # standard deviation of what is added to every weight


@dataclass(frozen=True)
class Examination:
    """The method that serves this network (never "two-pass": that is memory's choice), and why."""

    method: Method
    remarks: tuple[str, ...]


def examine(network: nn.Module, loss: Loss, batch: Batch, patients: Tensor) -> Examination:
    """Try a network and a loss on a small batch.

    The network's weights come back as they were, and so does torch's generator. Frozen parameters
    stay so.

    Args:
        network: in the mode in which it will be trained.
        loss: as in `clipped_sum`.
        batch: at least two samples that differ; values are of no consequence, phantoms will do.
        patients: (samples,), at least two patients.

    Raises:
        PlanError: batch norm or running statistics; buffers that a forward changes; a layer or loss
            that mixes samples.
        ValueError: fewer than two patients.
    """
    refuse_running_statistics(network)
    work, names = work_of(batch, patients)
    if len(names) < 2:
        raise ValueError("an examination needs samples of at least two patients")
    device = work.inputs.device
    with torch.random.fork_rng(devices=[device] if work.inputs.is_cuda else []), _moved(network):
        _refuse_memory(network, work)
        with out_of_place(network):
            _refuse_mixing(network, work)
        _refuse_mixing_loss(network, loss, work)
        return _compare(network, loss, work)


@contextmanager
def _moved(network: nn.Module) -> Iterator[None]:
    """Weights of which none is zero, for a block of work."""
    before = [(p, p.detach().clone()) for p in network.parameters() if p.is_floating_point()]
    try:
        with torch.no_grad():
            for parameter, values in before:
                parameter.add_(torch.randn_like(values), alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)


def _compare(network: nn.Module, loss: Loss, work: Work) -> Examination:
    """The batch's gradients against each patient's alone, dropout left out."""
    dropouts = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    training = [dropout.training for dropout in dropouts]
    try:
        for dropout in dropouts:
            dropout.eval()
        expected = gradients(network, loss, work, "loop")
        found = gradients(network, loss, work, "stored")
    except UnsupportedLayerError as error:
        return Examination("loop", (f"one backward for each patient, since no rule fits: {error}",))
    finally:
        for dropout, mode in zip(dropouts, training, strict=True):
            dropout.train(mode)
    wrong = _furthest(found, expected)
    if wrong is None:
        return Examination("stored", remarks_on(network))
    return Examination(
        "loop",
        (
            f"one backward for each patient, since the batch's gradient of {wrong} is not that of "
            "each patient alone (is it used outside its own layer?)",
        ),
    )


def _furthest(found: Gradients, expected: Gradients) -> str | None:
    """The parameter with the largest difference, where it is more than rounding."""
    scale = torch.stack(
        [rows.reshape(len(rows), -1).norm(dim=1) for rows in expected.values()]
    ).norm(dim=0)
    worst, name = TOLERANCE, None
    for key, rows in expected.items():
        other = found.get(key, torch.zeros_like(rows))
        share = (
            ((other - rows).reshape(len(rows), -1).norm(dim=1) / scale.clamp(min=1e-30))
            .max()
            .item()
        )
        if not share <= worst:
            worst, name = share, key
    return name


def _refuse_memory(network: nn.Module, work: Work) -> None:
    """Refuse buffers that a forward changes: what one patient left there would meet the next."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        network(work.inputs)
        for name, buffer in network.named_buffers():
            if not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
                raise PlanError(
                    f"the network's buffer {name!r} is changed by the patients that pass, so that "
                    "no per-patient gradient exists and their traces would leave the hospital; use "
                    "layers that keep nothing of their input"
                )


def _refuse_mixing(network: nn.Module, work: Work) -> None:
    """Refuse the innermost layer in which samples meet."""
    mixing: list[tuple[str, nn.Module]] = []

    def probe(name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not mixing and args and _mixes(args[0], output):
            mixing.append((name, layer))

    def cut(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_leaf(args[0]), *args[1:]) if args else args

    handles = []
    for name, layer in network.named_modules():
        if next(layer.children(), None) is None:
            handles.append(layer.register_forward_pre_hook(cut))
            handles.append(
                layer.register_forward_hook(lambda la, a, o, name=name: probe(name, la, a, o))
            )
    try:
        with torch.enable_grad():
            network(work.inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not mixing:
        with torch.enable_grad():
            start = _leaf(work.inputs)
            if not _mixes(start, network(start)):
                return
        mixing.append(("", network))
    name, layer = mixing[0]
    raise PlanError(
        f"the network's layer {name or 'itself'!r}, a {type(layer).__name__}, mixes the patients "
        "of a batch: what it gives for one depends on the others, so that no per-patient gradient "
        "exists; use a layer that treats each element of the batch alone, such as an instance or "
        "group norm"
    )


def _refuse_mixing_loss(network: nn.Module, loss: Loss, work: Work) -> None:
    """Refuse a loss in which samples meet."""
    with torch.no_grad():
        outputs = network(work.inputs)
    with torch.enable_grad():
        start = _leaf(outputs)
        if not isinstance(start, Tensor):
            return
        try:
            losses = losses_of(nn.Identity(), loss, Work(start, work.targets, (), work.weights))
        except ValueError as error:
            raise PlanError(f"the loss cannot be clipped by patient: {error}") from None
        if _mixes(start, losses):
            raise PlanError(
                "the loss of one sample depends on the others of the batch (a Dice over the batch, "
                "a weight from the batch's counts): use a loss that is computed for each sample"
            )


def _leaf(x: Any) -> Any:
    """A floating tensor as the start of a graph of its own."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def _mixes(x: Any, output: Any) -> bool:
    """True where a sample's output depends on another sample's input.

    Of the first and the last: a maximum over the batch is in one of them at most.
    """
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.requires_grad:
        return False
    if not output.requires_grad or output.ndim == 0 or len(output) != len(x):
        return False
    weights = torch.rand_like(output[0]) + 0.5
    for own, others in ((0, slice(1, None)), (-1, slice(-1))):
        (found,) = torch.autograd.grad(
            (output[own] * weights).sum(), x, allow_unused=True, retain_graph=True
        )
        if found is not None and bool((found[others] != 0).any()):
            return True
    return False
