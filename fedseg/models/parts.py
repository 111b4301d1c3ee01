"""Which part of a network a study trains; the rest stays as the study found it.

Few trained parameters matter under a guarantee: the noise's norm grows with the square root of
their number, the gradient's does not. Norm affines and the last layer adapt a pre-trained network
to new data (Tobaben et al., TMLR 2023, arXiv 2302.01190). The slopes of PReLU are left out: each is
shared by every channel and voxel of its layer, so that a handful has a larger gradient than all the
rest together, and would use up a patient's clip norm. Low-rank `adapters` reach the convolutions,
at a tenth or less of their numbers.
"""

from __future__ import annotations

from torch import nn

from fedseg.errors import PlanError
from fedseg.models.adapters import Adapted
from fedseg.plan import StudyPlan
from fedseg.training import Trainable

NORMS = (
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def freeze(network: nn.Module, trainable: Trainable) -> tuple[str, ...]:
    """Let a part of a network take gradients, in place, and nothing else of it.

    What the network's own code froze stays frozen under every choice.

    Args:
        network: as built; call it once, before an optimiser is made.
        trainable: `all`; `norms`, the affine parameters of norm layers; `adapters`, those that
            `adapt` gave the network; `head`, the convolution or linear layer that is defined last;
            or several of these.

    Returns:
        The names of the parameters that are trained, in the network's order.

    Raises:
        PlanError: the network has no such part; nothing was changed.
    """
    wanted = _wanted(network, trainable)
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = tuple(name for name, p in own.items() if wanted is None or id(p) in wanted)
    if not names:
        raise PlanError(
            f"training.trainable is {trainable}, but nothing of that can be trained: the network "
            "itself froze it; change training.trainable or model"
        )
    for name, parameter in own.items():
        parameter.requires_grad_(name in names)
    return names


def divide(network: nn.Module, plan: StudyPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of a network each site keeps to itself, and what nobody trains: neither travels.

    Args:
        network: after `freeze`.
        plan: its strategy says which part is personal.

    Returns:
        The names of both in alphabetical order, as `InitialModel` records them. A parameter that
        several layers share has several names, and either all of them are here or none is.

    Raises:
        PlanError: the network has no such part.
    """
    part = plan.aggregation.personal
    own = set() if part is None else _wanted(network, part) or set()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    personal = (n for n, p in parameters.items() if p.requires_grad and id(p) in own)
    frozen = (n for n, p in parameters.items() if not p.requires_grad)
    return tuple(sorted(personal)), tuple(sorted(frozen))


def require_division(network: nn.Module, plan: StudyPlan) -> None:
    """Check that a built plan divides the network as this installation does.

    Args:
        network: after `freeze`.

    Raises:
        PlanError: it does not: what it shares is not what would be trained here.
    """
    if divide(network, plan) != (plan.built.personal, plan.built.frozen):
        raise PlanError(
            "the plan names other tensors as personal or frozen than this network has here: build "
            "the plan again, or install the version of the network that it was built with"
        )


def _wanted(network: nn.Module, trainable: Trainable) -> set[int] | None:
    """The parameters of the wanted parts, by identity; None where all are wanted."""
    if trainable == "all":
        return None
    parts: list[nn.Module] = []
    if "norms" in trainable:
        norms = [layer for layer in network.modules() if _is(layer, NORMS)]
        if not norms:
            raise PlanError(
                f"training.trainable is {trainable}, but the network has no norm with affine "
                "parameters: choose a network that has, or train head or all"
            )
        parts += norms
    if "head" in trainable:
        head = head_of(network)
        if head is None:
            raise PlanError(
                f"training.trainable is {trainable}, but the network has no convolution or linear "
                "layer that could be its head: train norms or all"
            )
        parts.append(head)
    if "adapters" in trainable:
        adapted = [layer for layer in network.modules() if isinstance(layer, Adapted)]
        if not adapted:
            raise PlanError(
                f"training.trainable is {trainable}, but the network has no adapters: add "
                "model.adapters, for example {rank: 4}"
            )
        parts += [part for layer in adapted for part in (layer.down, layer.up)]
    return {id(p) for part in parts for p in part.parameters(recurse=False)}


def head_of(network: nn.Module) -> nn.Module | None:
    """The convolution or linear layer that is defined last; None in a network without any."""
    layers = [layer for layer in network.modules() if _is(layer, LAYERS)]
    return layers[-1] if layers else None


def _is(layer: nn.Module, kinds: tuple[type, ...]) -> bool:
    """True for a layer of these kinds that has parameters."""
    return isinstance(layer, kinds) and next(layer.parameters(recurse=False), None) is not None
