"""Torch in a state where equal work gives equal bits, whatever ran before in the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(threads: int, seed: int, device: torch.device) -> Iterator[None]:
    """Fix threads and the global generator for a block of work; both are put back afterwards.

    On CPU equal work gives equal bits. On a GPU deterministic algorithms are chosen where cuDNN
    has them; some of torch's other kernels may still differ in the last bits. Threads and generator
    belong to the process: one such block runs at a time.

    Args:
        threads: of torch, as in `plan.training.threads`.
        seed: for what draws from the global generator inside a network, such as dropout.
        device: where the network lies.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
