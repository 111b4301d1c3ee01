"""Networks by name: the built-in U-Net, and what a hospital installed itself.

An own network comes through the entry-point group `fedseg.networks`. The entry's name is the
plan's `model.network`; it loads an object with `version: str` and `build(task, options) -> Module`
(see `NetworkFactory`). Code never comes with a plan: a plan only names what each hospital chose to
install. Every network is checked for layers that mix patients before anyone trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import nn

from fedseg.arrays import Arrays, digest_of, schema_of, seed_for
from fedseg.errors import PlanError, TrustError
from fedseg.models.adapters import adapt, base_names, merged
from fedseg.models.parts import divide, freeze, head_of
from fedseg.models.unet import build_unet
from fedseg.network import Model, UNetOptions
from fedseg.plan import StudyPlan
from fedseg.schema import InitialModel
from fedseg.task import Task

GROUP = "fedseg.networks"
AVERAGED = (torch.float32, torch.float64, torch.float16)


class NetworkFactory(Protocol):
    """What an entry point of the group `fedseg.networks` loads."""

    version: str

    def build(self, task: Task, options: Mapping[str, JsonValue]) -> nn.Module:
        """Map (B, channels, *patch) to logits (B, 1 + labels, *patch)."""
        ...


def build_network(model: Model, task: Task) -> nn.Module:
    """Build the plan's network, with its adapters; weights come from torch's global generator.

    The head gets no adapter: it has few outputs, and is trained itself where a plan says so.

    Raises:
        PlanError: the network is not installed here, has another version than the plan's, cannot
            be built with these options, has a layer that mixes patients, or none for an adapter.
    """
    if model.network == "unet":
        network: nn.Module = build_unet(task, UNetOptions.model_validate(model.options))
    else:
        network = _build_installed(model, task)
    refuse_running_statistics(network)
    if model.adapters is not None:
        head = head_of(network)
        trained = model.adapters.down == "trained"
        leave = () if head is None else (head,)
        adapt(network, model.adapters.rank, train_down=trained, leave=leave)
    return network


def refuse_running_statistics(network: nn.Module) -> None:
    """Refuse layers in which patients meet.

    Raises:
        PlanError: a batch norm, or a norm with running statistics; the message names the layer.
    """
    for name, layer in network.named_modules():
        batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if batch_norm or getattr(layer, "running_mean", None) is not None:
            raise PlanError(
                f"the network's layer {name or 'itself'!r} is a {type(layer).__name__}: it "
                + ("mixes the patients of a batch" if batch_norm else "keeps running statistics")
                + ", so that no per-patient gradient exists or statistics of patients would leave "
                "the hospital; use an instance or group norm with track_running_stats=False"
            )


def initial_model(plan: StudyPlan) -> tuple[InitialModel, dict[str, NDArray[np.generic]]]:
    """The weights that the study starts from, and their record for the plan.

    Depends on the plan's seed alone; torch's global generator is left as it was.

    Raises:
        PlanError: see `build_network`; or one forward pass on an empty patch fails or has another
            shape than (1, 1 + labels, *patch); or a parameter or buffer cannot be averaged, since
            it is not floating point.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(plan.training.seed, "", 0, "initial model"))
        network = build_network(plan.model, plan.task)
        _check_types(network)
        _check_shape(network, plan.task)
    arrays = state_tensors(network)
    freeze(network, plan.training.trainable)
    personal, frozen = divide(network, plan)
    record = InitialModel(
        digest=digest_of(arrays), tensors=schema_of(arrays), personal=personal, frozen=frozen
    )
    return record, arrays


def require_start(plan: StudyPlan) -> None:
    """Refuse adapters beside weights that were drawn at random, where nothing useful is learnt.

    Raises:
        PlanError: the plan has adapters.
    """
    if plan.model.adapters is not None:
        raise PlanError(
            "model.adapters needs a trained model to adapt, and the plan's seed gives random "
            "weights, which would stay frozen: run `fedseg pretrain study.yaml --out MODEL`, then "
            "`fedseg plan build study.yaml --from MODEL`; or remove model.adapters"
        )


def state_tensors(network: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Copies of the network's parameters and buffers by name."""
    state = network.state_dict()
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def load_tensors(network: nn.Module, arrays: Arrays) -> None:
    """Copy arrays into the network's parameters and buffers.

    Raises:
        TrustError: the names, shapes or dtypes are not exactly the network's; nothing was copied.
    """
    own = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    if not _alike(own, arrays):
        expected, came = _describe(own), _describe(arrays)
        wrong = sorted(
            name for name in expected.keys() | came.keys() if expected.get(name) != came.get(name)
        )
        name = wrong[0]
        raise TrustError(
            f"the model does not fit the plan's network in {len(wrong)} tensors; the first is "
            f"{name[:80]!r}: expected {expected.get(name, 'none of that name')}, came "
            f"{came.get(name, 'none of that name')}; use the plan that the model was made with"
        )
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def readapted(
    arrays: Arrays, model: Model, other: Model, task: Task, fresh: Arrays
) -> dict[str, NDArray[np.generic]]:
    """A model's tensors for the same network with other adapters, or with none.

    Adapters that it has are folded into its weights, in float64 and rounded once. Adapters that it
    gets are fresh, so that what it computes stays the same up to that rounding.

    Args:
        arrays: of the model.
        model: that they belong to.
        other: the same but for its adapters.
        task: of both.
        fresh: tensors of `other`, whose adapters are taken.

    Raises:
        PlanError: see `build_network`.
        TrustError: arrays that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        old, new = build_network(model, task), build_network(other, task)
    load_tensors(old, arrays)
    plain = state_tensors(merged(old))
    names = base_names(new)
    found = {n: plain[names[n]] if n in names else np.array(a) for n, a in fresh.items()}
    load_tensors(new, found)
    return found


def _build_installed(model: Model, task: Task) -> nn.Module:
    """Build a network of an entry point."""
    entry = _find(model.network)
    try:
        factory = cast(NetworkFactory, entry.load())
        version = factory.version
        if version == model.version:
            network = factory.build(task, model.options)
    except Exception as error:
        raise PlanError(
            f"the network {model.network!r} of {entry.value!r} cannot be built: "
            f"{type(error).__name__}: {error}; change model.options, or mend the package"
        ) from error
    if version != model.version:
        raise PlanError(
            f"the plan asks for {model.network} {model.version}, but {version} is installed here; "
            f"install {model.version}, or change model.version and have the plan approved anew"
        )
    if not isinstance(network, nn.Module):
        raise PlanError(f"{entry.value!r} built a {type(network).__name__}, not a torch Module")
    return network


def _find(name: str) -> EntryPoint:
    """The entry point of one network."""
    installed = entry_points(group=GROUP)
    for entry in installed:
        if entry.name == name:
            return entry
    names = ", ".join(sorted({"unet", *(entry.name for entry in installed)}))
    raise PlanError(
        f"the network {name!r} is not installed here; installed: {names}. Install the package "
        f"that offers it (entry-point group {GROUP!r}), or change model.network"
    )


def _check_types(network: nn.Module) -> None:
    """Every tensor that travels can be averaged, and numpy and the container know its type."""
    for name, tensor in network.state_dict().items():
        if tensor.dtype not in AVERAGED:
            raise PlanError(
                f"the network's tensor {name[:80]!r} is {tensor.dtype}: the mean over hospitals "
                f"needs {', '.join(str(dtype) for dtype in AVERAGED)}; make it a float, or "
                "register the buffer with persistent=False where it never changes"
            )


def _check_shape(network: nn.Module, task: Task) -> None:
    """One forward pass on an empty patch."""
    patch = torch.zeros(1, len(task.channels), *task.patch_size)
    expected = (1, 1 + len(task.labels), *task.patch_size)
    try:
        with torch.no_grad():
            shape = tuple(network.eval()(patch).shape)
    except Exception as error:
        raise PlanError(
            f"the network fails on a patch of {list(task.patch_size)} with {len(task.channels)} "
            f"channels: {type(error).__name__}: {error}; change task.patch_size or model.options"
        ) from error
    if shape != expected:
        raise PlanError(
            f"the network answers a patch with the shape {list(shape)}, expected {list(expected)} "
            "(one class a label, and the background); change model.options"
        )


def _alike(some: Arrays, others: Arrays) -> bool:
    """True where names, dtypes and shapes are the same."""
    return some.keys() == others.keys() and all(
        array.dtype == others[name].dtype and array.shape == others[name].shape
        for name, array in some.items()
    )


def _describe(arrays: Arrays) -> dict[str, str]:
    """Dtype and shape of every array, for comparing and for messages."""
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
