"""How hospitals learn together: the plan's section `aggregation`.

Four choices that go together where they make sense: what the server does with the mean of the
updates, how the updates become a mean, what each site adds to its own training, and which part of
the network stays at home. A combination that would quietly do something else than it says is
refused here, with the reason.

| strategy | what it changes | paper |
|---|---|---|
| fedavg | nothing: the mean of the updates | McMahan et al., AISTATS 2017 |
| fedprox | a pull towards the round's model, at the sites | Li et al., MLSys 2020 |
| fedavgm | momentum at the server | Hsu et al., arXiv 1909.06335 |
| fedadam, fedyogi, fedadagrad | an adaptive server | Reddi et al., ICLR 2021 |
| scaffold | control variates correct each site's drift | Karimireddy et al., ICML 2020 |
| fedbn | affine parameters of norms stay at home | Li et al., ICLR 2021 |
| fedper | the head stays at home | Arivazhagan et al., arXiv 1912.00818 |
| ditto | a second, own model beside the shared one | Li et al., ICML 2021 |
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedseg.frozen import Count, Frozen, NotNegative, Positive

Strategy = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "scaffold",
    "fedbn",
    "fedper",
    "ditto",
]
Part = Literal["norms", "head"]
ADAPTIVE: tuple[Strategy, ...] = ("fedadam", "fedyogi", "fedadagrad")
PERSONAL: dict[Strategy, Part] = {"fedbn": "norms", "fedper": "head"}
_BETA2, _TAU = 0.99, 1e-3
_TITLES: dict[Strategy, str] = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "scaffold": "SCAFFOLD",
    "fedbn": "FedBN",
    "fedper": "FedPer",
    "ditto": "Ditto",
}


class Mean(Frozen):
    """The weighted mean of the updates; one false update moves it as far as it likes."""

    rule: Literal["mean"] = "mean"


class NormBound(Frozen):
    """The mean of updates each scaled down to a norm (Sun et al., arXiv 1911.07963)."""

    rule: Literal["norm_bound"]
    norm: Positive


class Median(Frozen):
    """The median of each coordinate (Yin et al., ICML 2018); needs more honest sites than false."""

    rule: Literal["median"]


class TrimmedMean(Frozen):
    """The mean of each coordinate less the `trim` lowest and highest (Yin et al., ICML 2018)."""

    rule: Literal["trimmed_mean"]
    trim: Count


class Krum(Frozen):
    """The one update closest to its neighbours (Blanchard et al., NeurIPS 2017)."""

    rule: Literal["krum"]
    byzantine: Count


class MultiKrum(Frozen):
    """The mean of the `keep` updates closest to their neighbours (Blanchard et al., 2017).

    `keep` is by default as many as answered, less `byzantine`.
    """

    rule: Literal["multi_krum"]
    byzantine: Count
    keep: Count | None = None


Combine = Annotated[
    Mean | NormBound | Median | TrimmedMean | Krum | MultiKrum, Field(discriminator="rule")
]


class Aggregation(Frozen):
    """How the sites' answers become the next model.

    Attributes:
        combine: how updates become one; all but `mean` and `norm_bound` count each site once.
        proximal_mu: of fedprox, the weight of mu / 2 * ||w - round's model||^2.
        ditto_lambda: of ditto, the same weight for a site's own model.
        server_learning_rate: 1 by default, 0.01 for the adaptive servers.
        server_momentum: beta_1 of the adaptive servers; 0.9 by default for fedavgm, fedadam and
            fedyogi, else 0.
        server_beta2: decay of the second moment of fedadam and fedyogi.
        server_tau: degree of adaptivity of the adaptive servers; the larger, the less.
        weight_averaging: decay of the moving average of models that is evaluated and released.
    """

    strategy: Strategy = "fedavg"
    combine: Combine = Mean()
    proximal_mu: NotNegative = 0.0
    ditto_lambda: NotNegative = 0.0
    rounds: Count = 20
    weighting: Literal["patients", "uniform"] = "patients"
    minimum_sites: Count = 3
    round_timeout_s: Positive = 3600.0
    attempts: Count = 2
    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_beta2: Annotated[float, Field(gt=0, lt=1)] = _BETA2
    server_tau: Positive = _TAU
    weight_averaging: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def title(self) -> str:
        """The strategy as papers spell it, with the rule that combines where it is not the mean."""
        name, rule = _TITLES[self.strategy], self.combine.rule
        return name if rule == "mean" else f"{name}, combined by {rule.replace('_', ' ')}"

    @property
    def adaptive(self) -> bool:
        """True where the server keeps a second moment."""
        return self.strategy in ADAPTIVE

    @property
    def personal(self) -> Part | None:
        """The part of the network that stays at each site, or None where all is shared."""
        return PERSONAL.get(self.strategy)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        usual: dict[str, float] = {}
        if given.get("strategy") in ADAPTIVE:
            usual["server_learning_rate"] = 0.01
        if given.get("strategy") in ("fedavgm", "fedadam", "fedyogi"):
            usual["server_momentum"] = 0.9
        return usual | given

    @model_validator(mode="after")
    def _strategy_settings(self) -> Self:
        for field, strategy in (("proximal_mu", "fedprox"), ("ditto_lambda", "ditto")):
            value = getattr(self, field)
            if self.strategy == strategy and value == 0:
                raise ValueError(
                    f"{field} must be above 0 for {strategy} (try 0.01); without it, say fedavg"
                )
            if self.strategy != strategy and value:
                raise ValueError(f"{field} belongs to {strategy}; remove it or set strategy")
        if self.strategy == "fedavg" and self.server_momentum:
            raise ValueError("fedavg with server_momentum is fedavgm: set strategy: fedavgm")
        if self.strategy == "fedavgm" and not self.server_momentum:
            raise ValueError("server_momentum must be above 0 for fedavgm (try 0.9)")
        if not self.adaptive and (self.server_beta2, self.server_tau) != (_BETA2, _TAU):
            raise ValueError(
                f"server_beta2 and server_tau belong to {', '.join(ADAPTIVE)}: remove them"
            )
        return self

    @model_validator(mode="after")
    def _scaffold_fits(self) -> Self:
        if self.strategy != "scaffold":
            return self
        if self.combine.rule != "mean":
            raise ValueError(
                f"scaffold with combine {self.combine.rule}: the server's control variate is the "
                "mean of the sites', which a robust rule does not keep; choose fedavg or fedprox"
            )
        if self.server_momentum or self.server_learning_rate != 1.0:
            raise ValueError("scaffold has no server_momentum and a server_learning_rate of 1")
        return self

    @model_validator(mode="after")
    def _combine_fits(self) -> Self:
        rule = self.combine
        if isinstance(rule, Mean | NormBound):
            return self
        if self.weighting != "uniform":
            raise ValueError(
                f"combine {rule.rule} counts every site once, so weighting: patients would say "
                "what does not happen; say weighting: uniform"
            )
        needed = _least_sites(rule)
        if self.minimum_sites < needed:
            raise ValueError(
                f"combine {rule.rule} needs at least {needed} answers a round to withstand what it "
                f"is set to; minimum_sites is {self.minimum_sites}"
            )
        keep = rule.keep if isinstance(rule, MultiKrum) else None
        if keep is not None and keep > self.minimum_sites:
            raise ValueError(f"combine.keep {keep} is more than minimum_sites")
        return self


def _least_sites(rule: Median | TrimmedMean | Krum | MultiKrum) -> int:
    """How many answers a robust rule needs, by its paper."""
    match rule:
        case Median():
            return 3
        case TrimmedMean():
            return 2 * rule.trim + 1
        case Krum() | MultiKrum():
            return 2 * rule.byzantine + 3
