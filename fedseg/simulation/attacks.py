"""Poisoning on purpose: what becomes of a study when some of its hospitals lie?

| attack | what the site sends | what it knows |
|---|---|---|
| sign_flip | `-FLIP` times its honest update: two of ten cancel the other eight | itself |
| scaled_noise | normal noise, in each tensor `LOUD` times as large as its honest update | itself |
| label_swap | an honest update, trained on labels that were exchanged | itself |
| alie | a little is enough (Baruch et al., NeurIPS 2019): mean - `ALIE_Z` deviations | colluders |

`alie` is the adaptive one: all its sites send the same update, within the spread of the honest
ones. It knows what its colluders would honestly send in this very round, and no more: mean and
deviation are of those updates, coordinate by coordinate. Every attacker computes them itself, from
the colluders' data, so that nothing depends on who answers first. The paper's own formula for the
number of deviations gives none to two of ten; 1.5 is what its experiments use. All attacks follow
from the plan's seed, site and round, so that equal studies stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedseg.aggregation.ownmodels import own_model
from fedseg.arrays import Arrays, digest_of, seed_for
from fedseg.container import pack, unpack
from fedseg.imaging.cases import Cohort
from fedseg.task import Task
from fedseg.updates import CONTROL, AnswerHeader, TaskHeader, Trained

Handle = Callable[[bytes], bytes]
Attack = Literal["sign_flip", "scaled_noise", "label_swap", "alie"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
RETRAINING: tuple[Attack, ...] = ("label_swap", "alie")
FLIP, LOUD, ALIE_Z = 4.0, 10.0, 1.5
_ANY_SIZE = 2**62
Delta = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Means:
    """What an attacker has besides its own honest `handle`.

    Attributes:
        seed: of the plan.
        swapped: the same site's `handle`, trained on exchanged labels; for label_swap.
        colluders: the honest `handle` of every other site that takes part in alie, by site.
    """

    seed: int = 0
    swapped: Handle | None = None
    colluders: Mapping[str, Handle] | None = None


def poisoned(attack: Attack, task: bytes, round_: int, honest: Handle, means: Means) -> bytes:
    """What an attacker answers to a training task; a refusal stays one."""
    if attack == "label_swap":
        assert means.swapped is not None  # made with the site's trainer
        return means.swapped(task)
    header, delta = _opened(honest(task))
    if not isinstance(header.body, Trained):
        return pack(header, delta)
    if attack == "sign_flip":
        return _said(header, {name: _as(-FLIP * _wide(a), a) for name, a in delta.items()}, task)
    if attack == "scaled_noise":
        seed = seed_for(means.seed, header.site, round_, "attack")
        return _said(header, _loud(delta, np.random.default_rng(seed)), task)
    others = means.colluders or {}
    answers = {site: _opened(handle(task)) for site, handle in others.items()}
    told = {site: d for site, (h, d) in answers.items() if isinstance(h.body, Trained)}
    told[header.site] = delta
    return _said(header, a_little_is_enough([told[site] for site in sorted(told)]), task)


def a_little_is_enough(honest: Sequence[Arrays], deviations: float = ALIE_Z) -> Delta:
    """Mean less so many standard deviations of updates, coordinate by coordinate."""
    found: Delta = {}
    for name, like in honest[0].items():
        values = np.stack([_wide(update[name]) for update in honest])
        found[name] = _as(values.mean(axis=0) - deviations * values.std(axis=0), like)
    return found


def label_swapped(cohort: Cohort, task: Task) -> Cohort:
    """The same scans with every label called the next one; a single label and background change."""
    from fedseg.imaging.readers import value_mapping

    values = sorted(task.labels.values())
    ring = values if len(values) > 1 else [0, *values]
    other = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
    drawn = value_mapping(task, cohort.label_map)
    pairs = ((value, other.get(meant, meant)) for value, meant in drawn.items())
    return replace(cohort, label_map=tuple(sorted(pairs)))


def _said(header: AnswerHeader, delta: Delta, task: bytes) -> bytes:
    """An attacker's answer; where it lets its own model go, that is the one that it made up."""
    body = header.body
    if isinstance(body, Trained) and body.consent is not None:
        _, came = unpack(task, TaskHeader, max_bytes=_ANY_SIZE, schema=None)
        model = {name: array for name, array in came.items() if not name.startswith(CONTROL)}
        false = {"model": digest_of(own_model(model, delta))}
        consent = body.consent.model_copy(update=false)
        header = header.model_copy(update={"body": body.model_copy(update={"consent": consent})})
    return pack(header, delta)


def _loud(delta: Delta, rng: np.random.Generator) -> Delta:
    """Noise in place of an update, tensor by tensor."""
    sizes = {name: LOUD * float(np.sqrt(np.mean(_wide(a) ** 2))) for name, a in delta.items()}
    return {n: _as(sizes[n] * rng.normal(size=delta[n].shape), delta[n]) for n in sorted(delta)}


def _opened(answer: bytes) -> tuple[AnswerHeader, Delta]:
    """An answer's header and update."""
    return unpack(answer, AnswerHeader, max_bytes=_ANY_SIZE, schema=None)


def _wide(array: NDArray[Any]) -> NDArray[np.float64]:
    """In float64."""
    return array.astype(np.float64)


def _as(values: NDArray[np.float64], like: NDArray[Any]) -> NDArray[Any]:
    """In the dtype of the honest update."""
    return np.asarray(values).astype(like.dtype)
