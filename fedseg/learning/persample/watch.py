"""One forward and backward of a whole batch that tells the gradients of each patient.

While a network is watched its parameters are frozen, so that the batched backward computes the
gradients of activations alone, and each layer that is trained does one of four things:
- folded layers (`folded`) and bare parameters get a copy of their weight for each sample;
- layers with a rule (`rules`) remember their input, and apply the rule when their output's
  gradient comes by;
- other layers without parts are run again for each patient alone, and a remark says so;
- anything else raises `UnsupportedLayerError`: the caller takes the loop over patients.
The network is put back as it was, whatever happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.learning.persample.deferred import Deferred, deferrable
from fedseg.learning.persample.folded import FOLDED
from fedseg.learning.persample.narrow import forward_of, narrow
from fedseg.learning.persample.rules import (
    RULES,
    Patients,
    Rule,
    UnsupportedLayerError,
    alone,
    sum_samples,
)

Sink = Callable[[str, Tensor], None]
Own = dict[str, str]  # a layer's own trained parameters: name in the layer -> name in the network


class Watch:
    """What the layers of a watched network report to; the public attributes may be exchanged.

    Args:
        samples: in the batch.
        patients: slices of the samples, side by side.
        sink: gets a parameter's name and gradients (patients, *parameter), in the order of the
            backward; more than once for a parameter that is used more than once.
        later: takes the weights that are better `deferred`, where the caller can wait.
    """

    def __init__(
        self, samples: int, patients: Patients, sink: Sink, later: list[Deferred] | None = None
    ) -> None:
        self.samples, self.patients, self.sink, self.later = samples, patients, sink, later
        self.uses: Counter[str] = Counter()
        self.keep = False
        self._inside = False
        self._anchor = torch.zeros((), requires_grad=True)

    def observe(
        self, name: str, rule: Rule, own: Own, layer: nn.Module,
        args: tuple[Any, ...], kwargs: dict[str, Any], output: Any,
    ) -> Any:  # fmt: skip
        """Forward hook: remember the input until the output's gradient comes."""
        if self._inside:
            return output
        x = args[0] if args else kwargs.get("input")
        several = rule is alone and len(args) + len(kwargs) != 1
        if several or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise UnsupportedLayerError(f"{name}: takes or gives more than one tensor")
        self._check_batch(name, x)
        self._check_batch(name, output)
        if not output.requires_grad:
            output = _Begin.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        held = [x.detach(), x._version]
        self.uses.update(own.values())
        output.register_hook(partial(self._apply, name, rule, own, layer, held))
        return output

    def spread(self, name: str, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A copy of a parameter for each sample, (samples, *shape), that reports its gradient."""
        copy = parameter.detach().reshape(1, *shape).expand(self.samples, *shape)
        copy = copy.clone().requires_grad_()
        self.uses[name] += 1

        def report(found: Tensor) -> None:
            assert found.grad is not None
            samples = found.grad.reshape(self.samples, *parameter.shape)
            found.grad = None
            self.sink(name, sum_samples(samples, self.patients))

        copy.register_post_accumulate_grad_hook(report)  # type: ignore[no-untyped-call]
        return copy

    def _apply(
        self, name: str, rule: Rule, own: Own, layer: nn.Module, held: list[Any], gradient: Tensor
    ) -> None:
        """Gradient hook of a layer's output."""
        x, version = held
        if x._version != version:
            raise UnsupportedLayerError(f"{name}: its input was changed in place after it was used")
        if not self.keep:
            held.clear()
        own = self._defer(own, layer, x, gradient)
        self._inside = True
        try:
            with torch.no_grad():
                found = rule(layer, x, gradient, self.patients, own)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(f"{name}: {error}") from None
        finally:
            self._inside = False
        for local, rows in found.items():
            self.sink(own[local], rows)

    def _defer(self, own: Own, layer: nn.Module, x: Tensor, gradient: Tensor) -> Own:
        """Put a weight off where that is possible; what is left to be done now."""
        weight = own.get("weight", "")
        if self.later is None or self.uses[weight] != 1:
            return own
        if not deferrable(layer, x, gradient, self.patients):
            return own
        assert isinstance(layer, nn.modules.conv._ConvNd)
        each = len(x) // len(self.patients)
        self.later.append(Deferred(weight, layer, x, gradient, each))
        return {local: name for local, name in own.items() if local != "weight"}

    def _check_batch(self, name: str, x: Tensor) -> None:
        if x.ndim == 0 or len(x) != self.samples:
            raise UnsupportedLayerError(
                f"{name}: its first axis is not the batch, so that nobody knows whose is whose"
            )


@contextmanager
def watched(network: nn.Module, watch: Watch) -> Iterator[None]:
    """Watch a network for a block of work.

    Raises:
        UnsupportedLayerError: a parameter for which there is no rule.
    """
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    names = {id(p): name for name, p in trained}
    with ExitStack() as stack:
        stack.enter_context(out_of_place(network))
        for name, layer in network.named_modules():
            own = {n: names[id(p)] for n, p in layer._parameters.items() if id(p) in names}
            if own:
                _attach(name or "the network itself", layer, own, watch, stack)
        for _, parameter in trained:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        yield


@contextmanager
def out_of_place(network: nn.Module) -> Iterator[None]:
    """Have layers that work in place make a copy for a block of work."""
    with ExitStack() as stack:
        for layer in network.modules():
            if getattr(layer, "inplace", None) is True:
                stack.enter_context(_attribute(layer, "inplace", False))
        yield


def remarks_on(network: nn.Module) -> tuple[str, ...]:
    """What is done about layers that are out of the ordinary, by name."""
    remarks = []
    for name, layer in network.named_modules():
        kind = type(layer).__name__
        if getattr(layer, "inplace", None) is True:
            remarks.append(f"{name}: {kind} works in place; it is run out of place")
        trained = any(p is not None and p.requires_grad for p in layer._parameters.values())
        if trained and type(layer) not in RULES and type(layer) not in FOLDED:
            if _is_leaf(layer):
                remarks.append(
                    f"{name}: no rule for {kind}; this layer takes one backward for each patient"
                )
            else:
                remarks.append(f"{name}: parameters of its own are copied for each sample")
    return tuple(remarks)


def _attach(name: str, layer: nn.Module, own: Own, watch: Watch, stack: ExitStack) -> None:
    """Have one layer report to the watch."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        raise UnsupportedLayerError(f"{name}: keeps running statistics")
    if type(layer) in FOLDED:
        stack.enter_context(_attribute(layer, "forward", _folded(name, layer, own, watch)))
    elif type(layer) in RULES or _is_leaf(layer):
        rule = RULES.get(type(layer), alone)
        if narrow(layer):
            stack.enter_context(_attribute(layer, "forward", forward_of(layer)))
        hook = partial(watch.observe, name, rule, own)
        stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
    else:
        _attach_bare(name, layer, own, watch, stack)


def _folded(name: str, layer: nn.Module, own: Own, watch: Watch) -> Callable[[Tensor], Tensor]:
    """A folded layer's forward."""
    compute = FOLDED[type(layer)]

    def forward(input: Tensor) -> Tensor:
        watch._check_batch(name, input)
        if input.ndim < 2:
            raise UnsupportedLayerError(f"{name}: its input has no channels")
        weights = {}
        for local, parameter in layer._parameters.items():
            if parameter is not None and local in own:
                weights[local] = watch.spread(own[local], parameter, tuple(parameter.shape))
            elif parameter is not None:
                weights[local] = parameter.detach().expand(len(input), *parameter.shape)
        return compute(layer, input, weights)

    return forward


def _attach_bare(name: str, layer: nn.Module, own: Own, watch: Watch, stack: ExitStack) -> None:
    """Parameters that a layer with parts uses itself, spread as its input would broadcast them."""
    kept = {local: layer._parameters[local] for local in own}

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            raise UnsupportedLayerError(f"{name}: has parameters of its own and no input tensor")
        watch._check_batch(name, x)
        for local, parameter in kept.items():
            assert parameter is not None
            shape = _broadcast(name, parameter, x.ndim)
            copy = watch.spread(own[local], parameter, shape)
            layer._parameters[local] = copy  # type: ignore[assignment]

    def after(layer: nn.Module, *_: object) -> None:
        layer._parameters.update(kept)

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)
    stack.callback(layer._parameters.update, kept)


def _broadcast(name: str, parameter: Tensor, ndim: int) -> tuple[int, ...]:
    """The parameter's shape without a batch axis, with ones where broadcasting puts them."""
    shape = tuple(parameter.shape)
    if len(shape) >= ndim and shape[0] == 1:
        return shape[1:]
    if len(shape) < ndim:
        return (1,) * (ndim - 1 - len(shape)) + shape
    raise UnsupportedLayerError(f"{name}: a parameter of its own has more axes than its input")


def _is_leaf(layer: nn.Module) -> bool:
    """True where a layer has no parts."""
    return next(layer.children(), None) is None


@contextmanager
def _attribute(layer: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance for a block of work."""
    missing = name not in layer.__dict__
    before = layer.__dict__.get(name)
    layer.__dict__[name] = value
    try:
        yield
    finally:
        if missing:
            del layer.__dict__[name]
        else:
            layer.__dict__[name] = before


class _Begin(torch.autograd.Function):
    """Identity at which a graph begins: what lies before it takes no gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        """Give the output, part of the graph from here on."""
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        """Nothing flows on."""
        return None, None
