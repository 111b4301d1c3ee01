"""Where a network runs: refused at once where torch has no such device."""

from __future__ import annotations

import re

import torch

from fedseg.errors import PlanError


def require_device(name: str) -> str:
    """The name of a device that torch can use here: cpu, cuda or cuda:N.

    Raises:
        PlanError: another name, or a GPU that is not there.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if not found:
        raise PlanError(f"--device takes cpu, cuda or cuda:N, not {name[:40]!r}")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise PlanError(
            f"--device {name}: torch finds no usable CUDA GPU here; say --device cpu, or mend the "
            "driver, or install a torch built for CUDA"
        )
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise PlanError(
            f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs here, counted "
            "from cuda:0"
        )
    return name
