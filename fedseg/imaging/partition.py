"""Sites and splits for data that name none: by patient, and the same for the same seed.

`iid` deals shuffled patients out evenly. `dirichlet:ALPHA` makes hospitals that differ: patients
are grouped by the quintile of their mean label volume, and each group is shared out among the
sites in proportions drawn from a Dirichlet distribution with concentration ALPHA, as Hsu et al.
2019 (arXiv:1909.06335) do with classes; their classes are our quintiles. A small ALPHA gives
sites of unequal size and anatomy, a large one approaches iid. No site is left without a patient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedseg.arrays import seed_for
from fedseg.errors import DataError
from fedseg.imaging.cases import Split

GROUPS = 5
VALIDATION_SHARE = 0.2


def parse_partition(text: str) -> float | None:
    """The concentration of "dirichlet:ALPHA", or None for "iid".

    Raises:
        DataError: neither of the two.
    """
    kind, _, number = text.strip().partition(":")
    if kind == "iid" and not number:
        return None
    try:
        alpha = float(number) if kind == "dirichlet" else 0.0
    except ValueError:
        alpha = 0.0
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(
            f"the partition {text[:40]!r} is unknown: say iid, or dirichlet:ALPHA with ALPHA above "
            "0, for example dirichlet:0.5"
        )
    return alpha


def assign_sites(
    sizes: Mapping[str, float], partition: str, sites: int, seed: int
) -> dict[str, str]:
    """Give every patient a site.

    Args:
        sizes: patient to mean label volume (any unit); used by dirichlet only.
        partition: "iid" or "dirichlet:ALPHA".
        sites: how many; named site_1, site_2, ...
        seed: the same seed gives the same sites whatever order the patients come in.

    Raises:
        DataError: an unknown partition, or fewer patients than sites.
    """
    alpha = parse_partition(partition)
    if sites < 1 or len(sizes) < sites:
        raise DataError(
            f"{len(sizes)} patients cannot make {sites} sites: ask for fewer with --sites"
        )
    rng = np.random.default_rng(seed_for(seed, "partition", 0, partition))
    patients = sorted(sizes)
    order = [patients[i] for i in rng.permutation(len(patients))]
    if alpha is None:
        place = {patient: i % sites for i, patient in enumerate(order)}
    else:
        place = _fill_empty(_dirichlet(order, sizes, alpha, sites, rng), order, sites)
    width = len(str(sites))
    return {patient: f"site_{place[patient] + 1:0{width}d}" for patient in patients}


def assign_splits(patients: Iterable[str], seed: int) -> dict[str, Split]:
    """Give every patient a split: 20 % of all patients are `val`, the others `train`.

    Patients are ranked by a seeded hash of their name, and the first fifth, rounded, is held back;
    of two patients or more at least one. Sites play no part: whoever divides the same patients
    otherwise, or not at all, measures on the same ones. A small site may hold back nobody.
    """
    everyone = set(patients)
    ranked = sorted(everyone, key=lambda patient: (seed_for(seed, patient, 0, "split"), patient))
    held = max(round(VALIDATION_SHARE * len(ranked)), 1) if len(ranked) > 1 else 0
    return {patient: "val" if i < held else "train" for i, patient in enumerate(ranked)}


def _dirichlet(
    order: Sequence[str],
    sizes: Mapping[str, float],
    alpha: float,
    sites: int,
    rng: np.random.Generator,
) -> dict[str, int]:
    """Share each quintile out in drawn proportions."""
    ranked = sorted(order, key=lambda patient: (sizes[patient], patient))
    place: dict[str, int] = {}
    for group in np.array_split(np.array(ranked, dtype=object), min(GROUPS, len(ranked))):
        shares = rng.dirichlet(np.full(sites, alpha))
        ends = np.rint(np.cumsum(shares) * len(group)).astype(int)[:-1]
        mixed = rng.permutation(len(group))
        for site, part in enumerate(np.split(mixed, ends)):
            place.update({str(group[i]): site for i in part})
    return place


def _fill_empty(place: dict[str, int], order: Sequence[str], sites: int) -> dict[str, int]:
    """Move a patient from the largest site to each empty one."""
    for site in range(sites):
        if site not in place.values():
            counts = np.bincount(list(place.values()), minlength=sites)
            largest = int(np.argmax(counts))
            place[next(p for p in order if place[p] == largest)] = site
    return place
