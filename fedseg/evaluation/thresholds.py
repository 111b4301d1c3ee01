"""What a hospital asks of a model before it looks at any: the section `acceptance` of its policy.

Thresholds are set beforehand or not at all; one that is None asks nothing. Nothing heavy is
imported here, because the policy is read everywhere.
"""

from __future__ import annotations

from pydantic import ConfigDict

from fedseg.frozen import Count, Fraction, Frozen, NotNegative, Positive


class Thresholds(Frozen):
    """The least that a model must do on this hospital's own held-back patients.

    Attributes:
        dice_at_least: mean over patients of the patient's Dice (its mean over labels).
        worst_case_dice_at_least: Dice of the patient with the lowest one.
        failures_share_at_most: patients with an empty or wild prediction, as a share of all.
        volume_bias_percent_at_most: of each label, predicted less true volume on average, without
            its sign, in percent of the mean true volume.
        hd95_mm_at_most: mean over patients of HD95.
        patients_at_least: fewer held-back patients decide nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dice_at_least: Fraction | None = None
    worst_case_dice_at_least: Fraction | None = None
    failures_share_at_most: Fraction | None = None
    volume_bias_percent_at_most: NotNegative | None = None
    hd95_mm_at_most: Positive | None = None
    patients_at_least: Count | None = None

    @property
    def asked(self) -> bool:
        """Whether anything is asked of a model; a number of patients alone asks nothing of it."""
        asked = self.model_dump(exclude={"patients_at_least"})
        return any(value is not None for value in asked.values())
