"""Torch in a state where equal work gives equal bits, whatever ran before in the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def repeatable(threads: int, seed: int, device: torch.device) -> Iterator[None]:
    """Fix threads and the global generator for a block of work; both are put back afterwards.

    On CPU equal work gives equal bits. On a GPU deterministic algorithms are chosen where cuDNN
    has them; some of torch's other kernels may still differ in the last bits. Threads and generator
    belong to the process: a lock lets one such block run at a time.

    Args:
        threads: of torch, as in `plan.training.threads`.
        seed: for what draws from the global generator inside a network, such as dropout.
        device: where the network lies.
    """
    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with _seeded(seed, device):
                yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A generator of our own, and cuDNN's deterministic algorithms, in the types that came."""
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,  # else it is switched off
            benchmark=False,
            deterministic=True,
            allow_tf32=False,
        ),
    ):
        torch.manual_seed(seed)
        yield
