"""Low-rank adapters: nothing changes at first, all of it folds in, and patients stay apart."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import PATIENTS, alone, batch, distance, loss, unet
from small_plans import values
from torch import Tensor, nn

from fedseg.errors import PlanError
from fedseg.learning.persample.examine import examine
from fedseg.learning.persample.gradients import gradients, work_of
from fedseg.learning.persample.watch import remarks_on
from fedseg.models.adapters import Adapted, adapt, base_names, merged
from fedseg.models.parts import freeze, head_of
from fedseg.models.standardised import StandardisedConv2d
from fedseg.models.zoo import build_network
from fedseg.network import Adapters
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.training import Trainable

UNETS = [(d, norm, units) for d in (2, 3) for norm in ("instance", "group") for units in (0, 2)]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@st.composite
def adapted_layers(draw: st.DrawFn) -> tuple[Adapted, Tensor]:
    """An adapted layer of any kind with any numbers in it, and an input; float64."""
    seed = draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    rank = draw(st.integers(1, 3))
    if draw(st.booleans()) and draw(st.booleans()):
        layer: Any = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        x = torch.randn(3, 2, layer.in_features)
    else:
        sides, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(sides))
        padding = draw(st.integers(0, 2))
        common: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups,
                                  "padding": padding, "bias": draw(st.booleans())}  # fmt: skip
        if draw(st.booleans()):
            out = draw(st.integers(0, max(stride, dilation) - 1))
            layer = TRANSPOSED[sides - 1](*channels, kernel, **common, output_padding=out)
        else:
            mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
            layer = CONVOLUTIONS[sides - 1](*channels, kernel, **common, padding_mode=mode)
        x = torch.randn(2, channels[0], *(draw(st.integers(5, 7)) for _ in range(sides)))
    adapted = Adapted(layer.double(), rank)
    nn.init.normal_(adapted.up.weight)  # type: ignore[arg-type]
    return adapted, x.double()


@settings(max_examples=150, deadline=None)
@given(adapted_layers())
def test_a_folded_layer_computes_what_the_adapted_one_does(case: tuple[Adapted, Tensor]) -> None:
    adapted, x = case
    plain = merged(nn.Sequential(adapted))[0]  # type: ignore[index]
    assert type(plain) is type(adapted.base) and plain.weight.shape == adapted.base.weight.shape
    expected = adapted(x)
    assert torch.allclose(plain(x), expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(plain.weight, adapted.base.weight)


def moved(network: nn.Module) -> nn.Module:
    """Adapters as training may leave them."""
    for layer in network.modules():
        if isinstance(layer, Adapted):
            nn.init.normal_(layer.up.weight, std=0.3)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(("dimensions", "norm", "units"), UNETS)
def test_an_adapted_network_begins_as_the_plain_one_and_folds_back(
    dimensions: int, norm: str, units: int
) -> None:
    plain, shape = unet(dimensions, norm, units)
    plain.double()
    network = deepcopy(plain)
    names = adapt(network, 2, leave=(head_of(network),))  # type: ignore[arg-type]
    assert names and all(isinstance(network.get_submodule(n), Adapted) for n in names)
    x, _ = batch(plain, shape, torch.float64)
    assert torch.equal(network(x), plain(x))
    renamed = {p: network.state_dict()[a] for a, p in base_names(network).items()}
    assert renamed.keys() == plain.state_dict().keys()
    assert all(torch.equal(renamed[name], t) for name, t in plain.state_dict().items())
    moved(network)
    before = deepcopy(network.state_dict())
    folded = merged(network)
    assert [(n, p.shape) for n, p in folded.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    assert all(p.requires_grad for p in folded.parameters())
    expected = network(x)
    assert not torch.allclose(expected, plain(x), atol=1e-3)
    assert torch.allclose(folded(x), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


@pytest.mark.parametrize("trainable", ["adapters", "norms+adapters", "norms+adapters+head"])
@pytest.mark.parametrize(("dimensions", "norm", "units"), UNETS)
def test_each_patients_gradients_are_autograds_without_a_fallback(
    dimensions: int, norm: str, units: int, trainable: Trainable
) -> None:
    network, shape = unet(dimensions, norm, units)
    network.double()
    adapt(network, 2, leave=(head_of(network),))  # type: ignore[arg-type]
    freeze(moved(network), trainable)
    assert remarks_on(network) == ()
    data = batch(network, shape, torch.float64)
    found = gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
    expected = alone(network, data, PATIENTS)
    assert found.keys() == expected.keys() and len(found) > 2
    assert distance(found, expected) < 1e-9
    examined = examine(network, loss, data, PATIENTS)
    assert (examined.method, examined.remarks) == ("stored", ())


def test_the_adapters_are_trained_and_nothing_else() -> None:
    network, _ = unet(2, "instance", 2)
    layers = adapt(network, 2, leave=(head_of(network),))  # type: ignore[arg-type]
    names = freeze(network, "adapters")
    assert set(names) == {f"{n}.{part}.weight" for n in layers for part in ("down", "up")}
    assert [n for n, p in network.named_parameters() if p.requires_grad] == list(names)


def test_with_down_frozen_only_up_is_trained() -> None:
    network, _ = unet(2, "instance", 0)
    layers = adapt(network, 2, train_down=False)
    assert freeze(network, "adapters") == tuple(f"{name}.up.weight" for name in layers)


@pytest.mark.parametrize("part", ["norms", "head"])
def test_adapters_go_with_other_parts(part: Trainable) -> None:
    def network() -> nn.Module:
        found, _ = unet(2, "instance", 0)
        adapt(found, 2, leave=(head_of(found),))  # type: ignore[arg-type]
        return found

    both: Trainable = "norms+adapters" if part == "norms" else "adapters+head"
    apart = (*freeze(network(), part), *freeze(network(), "adapters"))
    assert sorted(freeze(network(), both)) == sorted(apart)


def test_adapters_of_a_network_without_any_cannot_be_trained() -> None:
    network, _ = unet(2, "instance", 0)
    with pytest.raises(PlanError, match=r"has no adapters: add model\.adapters"):
        freeze(network, "adapters")


def test_layers_that_gain_nothing_are_left_as_they_are() -> None:
    wide = nn.Conv2d(8, 8, 3)  # 576 weights; an adapter of rank 4 has 4 * (72 + 8) = 320
    narrow = nn.Conv2d(8, 3, 3)  # 216; 4 * (72 + 3) = 300
    special = StandardisedConv2d(8, 8, 3)
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    network = nn.Sequential(wide, narrow, special, first, second)
    assert adapt(network, 4) == ("0",)
    assert network[1] is narrow and network[2] is special and network[3] is first
    assert isinstance(network[0], Adapted) and network[0].base is wide
    extra = sum(p.numel() for p in (*network[0].down.parameters(), *network[0].up.parameters()))
    assert extra == 320


def test_a_layer_in_two_places_is_adapted_and_folded_once() -> None:
    layer = nn.Linear(16, 16).double()
    network = nn.Sequential(layer, nn.Tanh(), layer)
    assert adapt(network, 2) == ("0",)
    assert network[0] is network[2]
    moved(network)
    x = torch.randn(4, 16, dtype=torch.float64)
    folded = merged(network)
    assert folded[0] is folded[2]  # type: ignore[index]
    assert torch.allclose(folded(x), network(x), rtol=1e-9, atol=1e-9)


def test_a_network_of_small_layers_is_refused_and_left_alone() -> None:
    network, _ = unet(2, "instance", 0)
    before = [name for name, _ in network.named_modules()]
    with pytest.raises(PlanError, match="lower the rank, or remove"):
        adapt(network, 200)
    assert [name for name, _ in network.named_modules()] == before
    assert all(p.requires_grad for p in network.parameters())


def test_an_adapter_is_drawn_from_the_global_generator() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        layer = nn.Conv2d(8, 8, 3)
        nn.init.ones_(layer.weight)
        torch.manual_seed(seed)
        return Adapted(layer, 2).down.weight  # type: ignore[return-value]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def plan_values(trainable: str, adapters: dict[str, Any] | None) -> dict[str, Any]:
    found = values()
    found["training"] = found.get("training", {}) | {"trainable": trainable}
    found["model"] = found.get("model", {}) | ({} if adapters is None else {"adapters": adapters})
    return found


def test_a_plan_without_adapters_has_the_bytes_that_it_had() -> None:
    plain = StudyPlan.model_validate(plan_values("norms", None))
    named = StudyPlan.model_validate(plan_values("norms", None) | {"model": plain.model})
    assert b"adapters" not in plain.canonical_bytes and named.digest == plain.digest
    adapted = StudyPlan.model_validate(plan_values("norms+adapters", {}))
    assert adapted.model_dump(mode="json")["model"]["adapters"] == {"rank": 4, "down": "trained"}
    assert StudyPlan.model_validate(adapted.model_dump(mode="json")).digest == adapted.digest
    assert adapted.digest != StudyPlan.model_validate(plan_values("norms", None)).digest


@pytest.mark.parametrize("trainable", ["adapters", "norms+adapters", "norms+adapters+head"])
def test_a_plan_cannot_train_adapters_that_it_has_not(trainable: str) -> None:
    with pytest.raises(ValueError, match=r"add model\.adapters, for example"):
        StudyPlan.model_validate(plan_values(trainable, None))


@pytest.mark.parametrize("trainable", ["all", "norms", "head", "norms+head"])
def test_a_plan_cannot_have_adapters_that_it_does_not_train(trainable: str) -> None:
    with pytest.raises(ValueError, match="say adapters or norms\\+adapters, or remove"):
        StudyPlan.model_validate(plan_values(trainable, {"rank": 2}))


@pytest.mark.parametrize(
    ("trainable", "adapters", "count"),
    [
        ("all", None, 449_191),
        ("norms", None, 512),
        ("head", None, 5_187),
        ("adapters", {"rank": 4}, 32_236),
        ("adapters", {"rank": 4, "down": "frozen"}, 1_024),
    ],
)
def test_the_counts_of_the_plans_page_are_those_of_the_example(
    trainable: Trainable, adapters: dict[str, Any] | None, count: int
) -> None:
    found = parse_plan(example("mr-3d").encode())
    model = found.model.model_copy(
        update={"adapters": None if adapters is None else Adapters.model_validate(adapters)}
    )
    network = build_network(model, found.task)
    names = freeze(network, trainable)
    assert sum(network.get_parameter(name).numel() for name in names) == count
    page = Path(__file__).parents[2] / "docs" / "plan.md"
    assert f"{count:,}" in page.read_text(encoding="utf-8")
