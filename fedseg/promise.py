"""What a plan promises to patients: the section `privacy` of a plan, and what leaves besides.

Under `local` each update of a hospital is differentially private on its own: nobody outside need be
trusted. The unit is the patient, with all images, patches and augmentations. Numbers that the
noise is divided by are declared here, never counted: a true count would leave with the update.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedseg.frozen import Count, Frozen, NotNegative, Positive

Openness = Literal["none", "noised", "suppressed", "plain"]
OPENNESS: tuple[Openness, ...] = ("none", "noised", "suppressed", "plain")  # least first


class Outputs(Frozen):
    """What leaves a hospital besides updates, and how.

    `none`: not at all. `noised`: a clipped mean with accounted noise. `suppressed`: only where it
    is about at least `suppress_below` patients. `plain`: as it is. Where a plan has a guarantee,
    what leaves suppressed or plain is not covered by it, and every guarantee says so.

    Attributes:
        counts: patients and cases by split, cases left out.
        losses: the mean training loss of a round.
        metrics: means over the held-back patients.
    """

    counts: Literal["none", "suppressed", "plain"] = "plain"
    losses: Literal["none", "suppressed", "plain"] = "plain"
    metrics: Openness = "plain"
    suppress_below: Count = 5


class Withheld(Outputs):
    """The same under a guarantee: what a plan does not name does not leave."""

    counts: Literal["none", "suppressed", "plain"] = "none"
    losses: Literal["none", "suppressed", "plain"] = "none"
    metrics: Openness = "none"


class NoPrivacy(Frozen):
    """No guarantee: the updates may reveal training images to the coordinator."""

    guarantee: Literal["none"] = "none"
    outputs: Outputs = Outputs()

    @model_validator(mode="after")
    def _no_noise(self) -> Self:
        if self.outputs.metrics == "noised":
            raise ValueError(
                "outputs.metrics: noise is accounted for under a guarantee alone; say guarantee: "
                "local, or suppressed, plain or none"
            )
        return self


class LocalPrivacy(Frozen):
    """Each update is (epsilon, delta)-private by its own hospital's noise, over the whole study.

    Attributes:
        epsilon: kept by training (and, for held-back patients, by noised metrics) over all rounds.
        delta: likewise; below one over any hospital's patients.
        clip_norm: C, to which each patient's gradient is clipped, once, after it was averaged over
            all of the patient's patches. Choose it on public data.
        clipping: `flat`, min(1, C / norm); `automatic`, C / (norm + 0.01) (Bu et al. 2023).
        rate: with which each patient is drawn for a step, by itself (Poisson); 1 is the full batch.
        expected_patients: training patients of a hospital, as declared: the noisy sum is divided
            by rate * expected_patients at every hospital, so that larger hospitals weigh more.
        expected_validation: likewise for held-back patients, where metrics leave noised.
        patches_per_patient: averaged before the one clip.
        release_after_s: an answer leaves so many seconds after its task came, so that how long
            the work took tells nothing; 0 sends it when it is ready.
        outputs: what leaves besides.
    """

    guarantee: Literal["local"]
    epsilon: Positive
    delta: Annotated[float, Field(ge=1e-9, lt=1)]
    clip_norm: Positive
    clipping: Literal["flat", "automatic"] = "flat"
    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    expected_patients: Count
    expected_validation: Count | None = None
    patches_per_patient: Count = 4
    release_after_s: NotNegative = 0.0
    outputs: Withheld = Withheld()

    @model_validator(mode="after")
    def _declared(self) -> Self:
        if self.outputs.metrics == "noised" and self.expected_validation is None:
            raise ValueError(
                "expected_validation is missing: noised metrics are divided by a number of "
                "held-back patients that is declared, not counted"
            )
        return self


Privacy = Annotated[NoPrivacy | LocalPrivacy, Field(discriminator="guarantee")]


class Calibration(Frozen):
    """The noise that keeps a plan's promise over its whole schedule; `fedseg plan build` finds it.

    Attributes:
        training: noise multiplier of each training step: standard deviation over clip norm.
        metrics: of each release of metrics: standard deviation over the largest norm of one
            patient's metrics; None where they do not leave noised.
    """

    training: Annotated[float, Field(ge=0.05, le=1e6, allow_inf_nan=False)]
    metrics: Annotated[float, Field(ge=0.05, le=1e6, allow_inf_nan=False)] | None = None
