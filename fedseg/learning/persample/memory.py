"""How many samples fit into the memory that a hospital allows, and in which mode.

An estimate: the tensors that autograd keeps of one sample, half as much again for what comes and
goes, and the gradients that the mode keeps. The parameters themselves are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedseg.errors import PlanError
from fedseg.learning.persample.gradients import Batch, Loss, Method

PASSING = 1.5
MIB = 1 << 20


@dataclass(frozen=True)
class Schedule:
    """Arguments of `clipped_sum`."""

    method: Method
    samples_at_once: int


def choose(
    network: nn.Module, loss: Loss, example: Batch, limit_bytes: int, samples_per_patient: int = 1
) -> Schedule:
    """Stored gradients where one sample's fit, else two passes.

    Args:
        network: as it will be trained.
        loss: as in `clipped_sum`.
        example: one sample; its forward is run once.
        limit_bytes: beside the parameters.
        samples_per_patient: two passes need all of a patient's samples at once.

    Raises:
        PlanError: neither fits; the message says how much would.
    """
    sample = int(PASSING * saved_bytes(network, loss, example))
    sizes = [p.numel() * p.element_size() for p in network.parameters() if p.requires_grad]
    gradient, layer = sum(sizes), max(sizes, default=0)
    # stored: the sum, a patient carried over, and for each sample its gradient; a layer comes twice
    stored = (limit_bytes - 2 * gradient - layer) // (sample + gradient)
    if stored >= 1:
        return Schedule("stored", stored)
    two_pass = (limit_bytes - gradient) // (sample + layer)
    if two_pass >= samples_per_patient:
        return Schedule("two-pass", two_pass)
    needed = gradient + samples_per_patient * (sample + layer)
    stored_needed = 3 * gradient + layer + sample
    raise PlanError(
        f"per-patient gradients of this network need about {min(needed, stored_needed) // MIB + 1} "
        f"MiB, {limit_bytes // MIB} are allowed: allow more memory, or make the patch or the "
        "network smaller"
    )


def saved_bytes(network: nn.Module, loss: Loss, example: Batch) -> int:
    """Bytes that autograd keeps for the backward of an example, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> None:  # a tensor would hold the graph that holds it, for ever
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()

    inputs, targets = example
    with (
        torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept),
    ):
        loss(network(inputs), targets)
    return sum(kept.values())
