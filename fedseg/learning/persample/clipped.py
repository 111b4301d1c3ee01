"""The sum of a batch's gradients, each patient's clipped once: what noise is added to.

The guarantee: with `stored` and `loop`, the vector that any one patient adds has norm at most C
as it is added, whatever the network, the data and the rounding; weights that are `deferred` have
the most that their sum may round by counted in. With `two-pass` the vector is
never formed: it is bounded up to the difference between two orders of the same float additions; in
mixed precision it is formed, a layer at a time. Sums are in the parameters' own type.
Where sums of several patients are rounded, taking one away may move the rest by units in the last
place; that is the caveat of all floating-point privacy, stated in `fedseg/privacy/noise.py`.

A patient whose gradient is not finite adds zero. Norms and patients are for the hospital's own
eyes: they are not private.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedseg.learning.persample.clip import Clipping, check_clip_norm, shares
from fedseg.learning.persample.deferred import Deferred
from fedseg.learning.persample.gradients import (
    Batch,
    Loss,
    Method,
    Work,
    backward,
    batched,
    gradients,
    pieces,
    work_of,
)
from fedseg.learning.persample.rules import Gradients, UnsupportedLayerError
from fedseg.learning.persample.watch import remarks_on

logger = logging.getLogger(__name__)

SLAB = 1 << 18
SMALL = 1 << 12


@dataclass(frozen=True)
class ClippedSum:
    """What a batch adds up to.

    Args:
        sum: by parameter, in the network's order; zeros where no patient had a gradient.
        norms: (patients,), float64, before clipping.
        patients: (patients,), the integers that were given, rising.
        remarks: layers treated specially, and why the loop was taken; nothing about data.
    """

    sum: dict[str, Tensor]
    norms: Tensor
    patients: Tensor
    remarks: tuple[str, ...] = ()


def clipped_sum(
    network: nn.Module,
    loss: Loss,
    batch: Batch,
    patients: Tensor,
    clip_norm: float,
    *,
    clipping: Clipping = "flat",
    method: Method = "stored",
    samples_at_once: int | None = None,
) -> ClippedSum:
    """Average each patient's gradient over its samples, clip it once, and add up.

    Call `examine` before a training for what this cannot see: layers and losses that mix patients.

    Args:
        network: in training mode or not; its trained parameters are those with requires_grad.
        loss: (outputs, targets) -> (samples,), each from its own sample alone.
        batch: inputs (samples, ...) and targets (samples, ...), on the network's device. An empty
            draw has no batch: its sum is `zero_sum`.
        patients: (samples,), an integer for each patient; samples need not be in order.
        clip_norm: C.
        clipping: see `clip`.
        method: "stored" keeps a micro-batch's gradients; "two-pass" goes backward twice and keeps
            one layer's; "loop" goes backward once for each patient. Layers for which there is no
            rule make it a loop, and a remark says so.
        samples_at_once: the micro-batch; see `memory.choose`.

    Raises:
        ValueError: a clip norm that bounds nothing, lengths that differ, a loss that is not one
            value for each sample, or nothing to train.
    """
    check_clip_norm(clip_norm)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("the network has no parameter that is trained")
    work, names = work_of(batch, patients)
    remarks = remarks_on(network) if method != "loop" else ()
    try:
        total = _add_up(network, loss, work, (clip_norm, clipping), method, samples_at_once)
    except UnsupportedLayerError as error:
        remark = f"one backward for each patient, since no rule fits: {error}"
        logger.warning("%s", remark)
        remarks = (remark,)
        total = _add_up(network, loss, work, (clip_norm, clipping), "loop", samples_at_once)
    return ClippedSum(total.close(), torch.cat(total.norms), names, remarks)


def zero_sum(network: nn.Module) -> ClippedSum:
    """The sum of an empty draw."""
    none = torch.zeros(0)
    sums = {n: _zeros_like(p) for n, p in network.named_parameters() if p.requires_grad}
    return ClippedSum(sums, none.double(), none.long())


def merge(parts: Sequence[ClippedSum]) -> ClippedSum:
    """Add up the sums of several devices, on the first one's; noise is added once, afterwards.

    No part is changed; the sum of one part alone shares its tensors.

    Raises:
        ValueError: a patient is in two of them, so that it was clipped twice.
    """
    patients = torch.cat([part.patients for part in parts])
    if len(torch.unique(patients)) != len(patients):
        raise ValueError("a patient's samples lie on two devices: its norm would be twice the clip")
    order = patients.argsort()
    total = parts[0].sum
    for part in parts[1:]:
        total = {name: own + part.sum[name].to(own.device) for name, own in total.items()}
    norms = torch.cat([part.norms.cpu() for part in parts])[order]
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    return ClippedSum(total, norms, patients[order], remarks)


class _Total:
    """The sum so far, and the norms of those that are in it."""

    def __init__(self, network: nn.Module, clip_norm: float, clipping: Clipping) -> None:
        self.norms: list[Tensor] = []
        self._trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._sum: dict[str, Tensor] = {}
        self._clip = clip_norm, clipping
        kinds = {p.dtype for p in self._trained.values()}
        self._dtype = max(kinds, key=lambda kind: torch.finfo(kind).eps)

    def weigh(self, squares: Tensor) -> Tensor:
        """The shares (patients,) of those with these squared norms."""
        norms = squares.sqrt()
        self.norms.append(norms.cpu())
        return shares(norms, *self._clip, self._dtype)

    def take(self, name: str, rows: Tensor) -> None:
        """Add gradients of one parameter that are clipped already."""
        self._put(name, rows.sum(0))

    def take_weighed(self, share: Tensor, name: str, rows: Tensor) -> None:
        """Clip gradients of one parameter by the shares of those whose they are, and add them."""
        self._put(name, torch.tensordot(share.to(rows.dtype), rows, dims=1))

    def add(self, rows: Gradients, later: Sequence[Deferred], count: int) -> None:
        """Clip the gradients of so many patients, and add them."""
        device = next(iter(self._trained.values())).device
        squares = torch.zeros(count, dtype=torch.float64, device=device)
        groups = _grouped({name: part.reshape(count, -1) for name, part in rows.items()})
        for _, part in groups:
            squares += squared_norms(part)
        for each in later:
            squares += each.squares()
        share = self.weigh(squares)
        lost = ~squares.isfinite()
        some_lost = bool(lost.any())
        for names, part in groups:
            if some_lost:
                part[lost] = 0
            clipped = part.mT @ share.to(part.dtype)
            shapes = [rows[name].shape[1:] for name in names]
            sizes = [shape.numel() for shape in shapes]
            for name, shape, own in zip(names, shapes, torch.split(clipped, sizes), strict=True):
                self._put(name, own.view(shape))
        for each in later:
            self._put(each.name, each.weighted(share))

    def close(self) -> dict[str, Tensor]:
        """The sum by parameter, in the network's order; zeros where nothing came."""
        return {
            name: self._sum[name] if name in self._sum else _zeros_like(p)
            for name, p in self._trained.items()
        }

    def _put(self, name: str, part: Tensor) -> None:
        """Add what is the sum's own from here on."""
        if name in self._sum:
            self._sum[name] += part
        else:
            self._sum[name] = part.contiguous()


def _grouped(rows: Gradients) -> list[tuple[list[str], Tensor]]:
    """Gradients (patients, numbers), the small ones of a type side by side: fewer calls."""
    small: dict[torch.dtype, list[str]] = {}
    groups = []
    for name, part in rows.items():
        if part.shape[1] <= SMALL:
            small.setdefault(part.dtype, []).append(name)
        else:
            groups.append(([name], part))
    joined = [(names, torch.cat([rows[n] for n in names], 1)) for names in small.values()]
    return groups + joined


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms (patients,) of gradients (patients, ...), in float64, slab by slab."""
    flat = rows.reshape(len(rows), -1)
    total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for slab in torch.split(flat, max(1, SLAB // max(1, len(flat))), dim=1):
        total += torch.linalg.vector_norm(slab.double(), dim=1).square()
    return total


def _add_up(
    network: nn.Module, loss: Loss, work: Work, clip: tuple[float, Clipping], method: Method,
    samples: int | None,
) -> _Total:  # fmt: skip
    """The clipped sum of all pieces."""
    total = _Total(network, *clip)
    carried: Gradients = {}
    for piece in pieces(work, samples, method):
        if method == "two-pass":
            _two_passes(network, loss, piece, total)
            continue
        later: list[Deferred] = []
        whole = piece.begins and piece.ends
        rows = gradients(network, loss, piece, method, later if whole else None)
        count = len(piece.patients)
        with torch.no_grad(), torch.autocast(work.inputs.device.type, enabled=False):
            if not piece.begins:
                for name, part in carried.items():
                    if name not in rows:  # used by this patient's earlier samples alone
                        rows[name] = part.new_zeros(count, *part.shape)
                    rows[name][0] += part
            if not piece.ends:
                carried = {name: part[-1].clone() for name, part in rows.items()}
                rows, count = {name: part[:-1] for name, part in rows.items()}, count - 1
            if count:
                total.add(rows, later, count)
    return total


def _two_passes(network: nn.Module, loss: Loss, piece: Work, total: _Total) -> None:
    """Norms from a first backward, the weighted sum from a second through the same graph.

    The same graph, since a second forward would draw another dropout than the one that was bounded.
    Mixed precision rounds the second backward by far more than the order of additions does: there
    it gives each patient's gradient once more, and those are weighed.
    """
    mixed = torch.is_autocast_enabled(piece.inputs.device.type)
    squares = _Squares(len(piece.patients), piece.inputs.device)
    with batched(network, loss, piece, squares.add) as (watch, losses):
        squares.uses = watch.uses
        watch.keep = True
        backward(losses, piece.weights, again=True)
        share = total.weigh(squares.close())
        kept = share > 0
        good = [p for p, keep in zip(piece.patients, kept.tolist(), strict=True) if keep]
        watch.keep = False
        if not good:
            return
        factors = piece.weights
        if mixed:
            watch.patients, watch.sink = good, partial(total.take_weighed, share[kept])
        else:
            whole = [slice(0, len(piece.inputs))]
            watch.patients = whole if len(good) == len(piece.patients) else good
            watch.sink = total.take
            counts = torch.tensor([p.stop - p.start for p in piece.patients])
            factors = factors * share.repeat_interleave(counts.to(share.device))
        backward(losses, factors)


class _Squares:
    """Squared norms of whole parameters: one used twice is added up before it is squared."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.uses: dict[str, int] = {}
        self._squares = torch.zeros(count, dtype=torch.float64, device=device)
        self._waiting: Gradients = {}
        self._seen: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """Take in one use's gradients."""
        self._seen[name] = self._seen.get(name, 0) + 1
        if name in self._waiting:
            rows = self._waiting.pop(name) + rows
        if self._seen[name] < self.uses[name]:
            self._waiting[name] = rows
        else:
            self._squares += squared_norms(rows)

    def close(self) -> Tensor:
        """The squares, with what waited for a use that took no part in the loss."""
        for rows in self._waiting.values():
            self._squares += squared_norms(rows)
        self._waiting.clear()
        return self._squares


def _zeros_like(parameter: Tensor) -> Tensor:
    """Zeros to add a parameter's gradients to."""
    return torch.zeros_like(parameter, memory_format=torch.contiguous_format).detach()
