"""Where a private step takes its time beside a plain one, part by part, in CPU milliseconds.

Parts are timed where they are called, in turn with plain steps, and are medians. What plain takes
for weights is one call for the whole batch on the same tensors, timed afterwards; so the rest of a
plain backward is a difference, and small negative numbers are noise.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedseg.learning.persample import clipped, gradients, rules, watch
from fedseg.learning.persample.deferred import Deferred, deferrable

Times = dict[str, list[float]]
DEFERRED = "deferred weights: their sum"
PARTS = (
    "forward", "rest of the backward", "weights, stride 1", "weights, strided",
    "weights, transposed", "weights, other", DEFERRED, "deferred weights: norms",
    "other weights: norms", "other weights: clip and sum", "everything else",
)  # fmt: skip


def explain(network: nn.Module, data: Any, losses: Any, clip: float, steps: int) -> str:
    """A table of the parts of one row."""
    spent: Times = defaultdict(list)
    whole: Times = defaultdict(list)
    seen: list[tuple[Any, ...]] = []
    patients = torch.arange(len(data[0]))
    for step in range(steps + 1):
        plain, ours = _plain(network, data, losses), defaultdict(float)
        with _timers(ours, seen):
            begin = time.process_time()
            clipped.clipped_sum(network, losses, data, patients, clip)
            ours["all"] = time.process_time() - begin
        again: dict[str, float] = defaultdict(float)
        for layer, x, gradient, slices, wanted in seen:
            kind = _kind(layer, x, gradient, slices, wanted)
            again[kind] += _weights(layer, x, gradient)
        seen.clear()
        if step:
            for name, value in _parts(ours).items():
                spent[name].append(value)
            plain["rest of the backward"] -= sum(again.values())
            for name, value in {**plain, **again}.items():
                whole[name].append(value)
    return _table(whole, spent)


def _plain(network: nn.Module, data: Any, losses: Any) -> dict[str, float]:
    """One plain step."""
    network.zero_grad()
    begin = time.process_time()
    loss = losses(network(data[0]), data[1]).mean()
    between = time.process_time()
    loss.backward()
    end = time.process_time()
    network.zero_grad()
    return {"forward": between - begin, "rest of the backward": end - between}


@contextmanager
def _timers(spent: dict[str, float], seen: list[tuple[Any, ...]]) -> Iterator[None]:
    """Time the parts of a clipped sum, and remember the convolutions' tensors."""
    usual = rules.convolution

    def convolution(*call: Any) -> Any:
        seen.append(call)
        begin = time.process_time()
        found = usual(*call)
        spent[_kind(*call)] += time.process_time() - begin
        return found

    own = {kind: convolution for kind, rule in rules.RULES.items() if rule is usual}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(watch.RULES, own))
        for place, name in (
            (gradients, "losses_of"), (gradients, "backward"), (clipped._Total, "add"),
            (clipped, "squared_norms"), (Deferred, "squares"), (Deferred, "weighted"),
            (watch.Watch, "_apply"),
        ):  # fmt: skip
            timed = _timed(getattr(place, name), name, spent)
            stack.enter_context(patch.object(place, name, timed))
        yield


def _timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += time.process_time() - begin

    return timed


def _parts(spent: dict[str, float]) -> dict[str, float]:
    """Times that hold one another, made into parts that add up to the whole."""
    kinds = {name: spent[name] for name in PARTS if name.startswith("weights")}
    deferred = spent["squares"] + spent["weighted"]
    found = {
        "forward": spent["losses_of"],
        "rest of the backward": spent["backward"] - sum(kinds.values()),
        **kinds,
        DEFERRED: spent["weighted"],
        "deferred weights: norms": spent["squares"],
        "other weights: norms": spent["squared_norms"],
        "other weights: clip and sum": spent["add"] - deferred - spent["squared_norms"],
    }
    found["everything else"] = spent["all"] - sum(found.values())
    return found


def _kind(layer: nn.Module, x: Any, gradient: Any, slices: Any, wanted: Any) -> str:
    """Which part a convolution's weight is of."""
    assert isinstance(layer, _ConvNd)
    if "weight" not in wanted and deferrable(layer, x, gradient, slices):
        return DEFERRED
    if isinstance(layer, _ConvTransposeNd):
        return "weights, transposed"
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return "weights, other"
    return "weights, stride 1" if set(layer.stride) == {1} else "weights, strided"


def _weights(layer: _ConvNd, x: Any, gradient: Any) -> float:
    """Seconds of the weight's gradient as plain training takes it, for the batch at once."""
    begin = time.process_time()
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        rules.convolution(layer, x, gradient, [slice(0, len(x))], ("weight",))
    else:
        torch.ops.aten.convolution_backward(
            gradient, x, layer.weight.detach(), None, layer.stride, layer.padding, layer.dilation,
            isinstance(layer, _ConvTransposeNd), layer.output_padding, layer.groups,
            [False, True, False],
        )  # fmt: skip
    return time.process_time() - begin


def _table(plain: Times, ours: Times) -> str:
    """Medians in milliseconds, and what of the plain step each part adds."""
    total = sum(statistics.median(plain[name]) for name in PARTS if name in plain)
    lines = ["                             plain ms   ours ms     more   of plain"]
    sums = [0.0, 0.0]
    for name in PARTS:
        pair = [1e3 * statistics.median(times.get(name, [0.0])) for times in (plain, ours)]
        sums = [a + b for a, b in zip(sums, pair, strict=True)]
        if any(pair):
            lines.append(_line(name, pair, total))
    return "\n".join([*lines, _line("sum", sums, total)])


def _line(name: str, pair: list[float], total: float) -> str:
    more = pair[1] - pair[0]
    return f"{name:<28}{pair[0]:>9.1f}{pair[1]:>10.1f}{more:>9.1f}{more / total / 1e3:>10.1%}"
