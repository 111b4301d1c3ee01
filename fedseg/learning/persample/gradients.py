"""Gradients of every patient of a batch by name, in a batch or by the loop that it replaces.

A patient's loss is the mean over its samples (patches, augmentations), so that its gradient is one
vector however many samples it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedseg.learning.persample.deferred import Deferred
from fedseg.learning.persample.rules import Gradients
from fedseg.learning.persample.watch import Sink, Watch, watched

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
Method = Literal["stored", "two-pass", "loop"]


@dataclass(frozen=True)
class Work:
    """Samples with each patient's side by side.

    `patients` are slices of the samples; `weights` (samples,) is one over the number of samples
    that the patient has in the whole batch; `begins` is False where the first patient's earlier
    samples lie in an earlier piece, `ends` False where the last one's later samples follow.
    """

    inputs: Tensor
    targets: Tensor
    patients: tuple[slice, ...]
    weights: Tensor
    begins: bool = True
    ends: bool = True


def work_of(batch: Batch, patients: Tensor) -> tuple[Work, Tensor]:
    """Sort a batch by patient.

    Args:
        batch: inputs (samples, ...) and targets (samples, ...).
        patients: (samples,), an integer for each patient.

    Returns:
        the work, and the patients' integers in its order.

    Raises:
        ValueError: lengths differ, or there is no sample.
    """
    inputs, targets = batch
    if not len(inputs) == len(targets) == len(patients) or patients.ndim != 1 or not len(inputs):
        raise ValueError(
            f"expected as many inputs, targets and patients, and at least one; came {len(inputs)}, "
            f"{len(targets)} and {list(patients.shape)}"
        )
    patients = patients.cpu()
    if bool((patients[1:] < patients[:-1]).any()):
        order = patients.argsort(stable=True)
        patients = patients[order]
        inputs, targets = inputs[order.to(inputs.device)], targets[order.to(targets.device)]
    names, counts = torch.unique_consecutive(patients, return_counts=True)
    stops = counts.cumsum(0).tolist()
    slices = tuple(slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True))
    weights = (1 / counts.double()).repeat_interleave(counts).to(inputs.device)
    return Work(inputs, targets, slices, weights), names


def pieces(work: Work, samples: int | None, method: Method) -> Iterator[Work]:
    """Cut work into micro-batches.

    Args:
        work: of the whole batch.
        samples: at most so many in a piece; None for no limit. Two-pass pieces hold whole patients,
            and go beyond it where one patient has more samples.
        method: the loop's pieces hold one patient each.
    """
    limit = samples or len(work.inputs)
    if limit < 1:
        raise ValueError(f"expected at least one sample at once, came {samples}")
    if method == "loop":
        cuts = [
            (start, min(start + limit, p.stop))
            for p in work.patients
            for start in range(p.start, p.stop, limit)
        ]
    elif method == "stored":
        cuts = [(n, min(n + limit, len(work.inputs))) for n in range(0, len(work.inputs), limit)]
    else:
        cuts = _whole_patients(work.patients, limit)
    return (_piece(work, start, stop) for start, stop in cuts)


def gradients(
    network: nn.Module,
    loss: Loss,
    piece: Work,
    method: Method,
    later: list[Deferred] | None = None,
) -> Gradients:
    """Gradients (patients, *parameter) of one piece of work, by name; unused parameters have none.

    Those that are better deferred go into `later` where there is such a list.

    Raises:
        UnsupportedLayerError: see `watched`; only the loop can do it.
        ValueError: the loss is not one value for each sample.
    """
    if method == "loop":
        return _alone(network, loss, piece)
    found: Gradients = {}

    def sink(name: str, rows: Tensor) -> None:
        found[name] = found[name] + rows if name in found else rows

    with batched(network, loss, piece, sink, later) as (_, losses):
        backward(losses, piece.weights)
    return found


@contextmanager
def batched(
    network: nn.Module, loss: Loss, piece: Work, sink: Sink, later: list[Deferred] | None = None
) -> Iterator[tuple[Watch, Tensor]]:
    """The forward of a watched network: gives the watch and the losses (samples,)."""
    watch = Watch(len(piece.inputs), piece.patients, sink, later)
    with watched(network, watch):
        yield watch, losses_of(network, loss, piece)


def losses_of(network: nn.Module, loss: Loss, piece: Work) -> Tensor:
    """One loss for each sample."""
    losses = loss(network(piece.inputs), piece.targets)
    if losses.shape != (len(piece.inputs),):
        raise ValueError(
            f"expected a loss for each sample, shape [{len(piece.inputs)}], came "
            f"{list(losses.shape)}: a loss that is averaged over the batch has no patients"
        )
    return losses


def backward(losses: Tensor, weights: Tensor, *, again: bool = False) -> None:
    """Backward of the weighted sum of the losses, outside autocast."""
    if losses.requires_grad:
        with torch.autocast(losses.device.type, enabled=False):
            torch.autograd.backward(losses, weights.to(losses), retain_graph=again)


def _alone(network: nn.Module, loss: Loss, piece: Work) -> Gradients:
    """The gradients of a piece that holds one patient, by plain autograd."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for patient in piece.patients:
        one = replace(
            piece,
            inputs=piece.inputs[patient], targets=piece.targets[patient],
            patients=(slice(0, patient.stop - patient.start),), weights=piece.weights[patient],
        )  # fmt: skip
        losses = losses_of(network, loss, one)
        with torch.autocast(losses.device.type, enabled=False):
            found = torch.autograd.grad(
                losses, list(named.values()), one.weights.to(losses), allow_unused=True
            )
        for (name, parameter), part in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if part is None else part)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def _whole_patients(patients: tuple[slice, ...], limit: int) -> list[tuple[int, int]]:
    """Ranges of samples that hold whole patients."""
    cuts: list[tuple[int, int]] = []
    for patient in patients:
        if cuts and patient.stop - cuts[-1][0] <= limit:
            cuts[-1] = (cuts[-1][0], patient.stop)
        else:
            cuts.append((patient.start, patient.stop))
    return cuts


def _piece(work: Work, start: int, stop: int) -> Work:
    """The samples start, ..., stop - 1."""
    inside = [p for p in work.patients if p.start < stop and p.stop > start]
    slices = [slice(max(p.start, start), min(p.stop, stop)) for p in inside]
    return Work(
        inputs=work.inputs[start:stop],
        targets=work.targets[start:stop],
        patients=tuple(slice(p.start - start, p.stop - start) for p in slices),
        weights=work.weights[start:stop],
        begins=inside[0].start >= start,
        ends=inside[-1].stop <= stop,
    )
