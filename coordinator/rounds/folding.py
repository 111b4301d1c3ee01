"""The answers of one stage: each opened, checked, added to the sum, and forgotten.

An answer that does not fit is refused and its site named with a code; the stage goes on. A site
counts once, whatever comes under its name and through whichever node.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from coordinator.rounds.asking import Arrival
from coordinator.rounds.events import Observer, SiteAnswered, SiteFailed
from coordinator.rounds.exchange import Exchange
from coordinator.rounds.roster import Roster
from fedseg.aggregation.ownmodels import LetGo, OwnModels, own_model
from fedseg.aggregation.robust import Combiner
from fedseg.aggregation.rounds import Outcome, Position, weight_of
from fedseg.arrays import Arrays, digest_of
from fedseg.carriage import unwrap
from fedseg.durable import Buffer
from fedseg.errors import RoundError, StorageError, TrustError
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer, SiteFailure
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll
from fedseg.updates import (
    AnswerError,
    AnswerHeader,
    Enlisted,
    Evaluated,
    TaskHeader,
    Trained,
    open_answer,
)

logger = logging.getLogger(__name__)

_FLOWER_CODES = {3: "expired", 4: "expired", 5: "unavailable", 8: "crashed"}


@dataclass(frozen=True)
class Keeping:
    """Where own models of a training stage are kept.

    Attributes:
        shared: what they begin from.
        roll: of the sites that they are let go to; None where there is none.
    """

    models: OwnModels
    shared: Arrays
    roll: SignedRoll | None


class Folding:
    """What came in one stage so far.

    Args:
        position: the stage.
        task: what was asked, and its digest.
        total: combines the updates of a training stage; None in others.
        keeping: of the last round, where the plan measures own models; None in other stages.
    """

    def __init__(
        self,
        plan: StudyPlan,
        position: Position,
        task: tuple[TaskHeader, str],
        *,
        roster: Roster,
        exchange: Exchange,
        observe: Observer,
        total: Combiner | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self._plan, self._position, (self._task, self._digest) = plan, position, task
        self._roster, self._exchange, self._observe = roster, exchange, observe
        self._total, self._keeping = total, keeping
        self._answers: dict[str, SiteAnswer] = {}
        self._failures: dict[str, SiteFailure] = {}

    def answered(self, site: str) -> bool:
        """Whether an answer of the site was folded."""
        return site in self._answers

    def absent(self, sites: Collection[str]) -> None:
        """Name sites that cannot be asked now; they may still answer later."""
        reason = "the site is not on line, or has not enlisted"
        for site in sorted(sites):
            self._fail(SiteFailure(site=site, code="offline", reason=reason))

    def take(self, node: int, message: Arrival) -> None:
        """Take a node's answer; None where it gave none in time.

        Raises:
            StorageError: no room here for what the rule keeps of an update; no site is to blame.
        """
        name = self._roster.site_of(node) or f"node-{node}"
        try:
            data = _data_of(message)
            signer, plain = self._exchange.open(data)
            if signer is not None and self._roster.site_of(node) is None:
                name = signer
            answer = self._fold(node, signer, plain, len(data))
        except StorageError:
            raise
        except (AnswerError, RoundError) as error:
            code = error.code if isinstance(error, AnswerError) else "overflow"
            self._fail(SiteFailure(site=name, code=code, reason=str(error)))
            return
        self._answers[answer.site] = answer
        self._failures.pop(answer.site, None)
        digest, at = hashlib.sha256(data).hexdigest(), self._position
        self._observe(SiteAnswered(at.round, at.stage, answer, digest, at.owner))

    def outcome(self, bytes_down: int) -> Outcome:
        """All that came."""
        answers, failures = tuple(self._answers.values()), tuple(self._failures.values())
        return Outcome(bytes_down, answers, failures, self._total)

    def _fold(self, node: int, signer: str | None, data: Buffer, size: int) -> SiteAnswer:
        """Check one answer and add its update to the sum."""
        header, delta = open_answer(
            data,
            self._plan,
            task=self._digest,
            stage=self._position.stage,
            site=self._roster.site_of(node),
            model=self._task.model,
        )
        if signer not in (None, header.site):
            raise AnswerError("site", f"{signer} signed an answer that names {header.site}")
        body = header.body
        if isinstance(body, Enlisted):
            patients = body.patients.get("train", 0)
            self._roster.add(node, header.site, patients, proven=signer is not None)
        elif self.answered(header.site):
            raise AnswerError("site", f"{header.site} has answered already")
        if self._total is not None and isinstance(body, Trained):
            self._check_patients(node, body.patients)
            if body.consent is not None:
                self._keep(body.consent, delta)
            self._total.fold(delta, weight_of(body, self._plan), header.site)
        return _answer_of(header, size)

    def _keep(self, consent: Consent, delta: Arrays) -> None:
        """Keep a site's own model, if it is the one that the site let go; before its update counts.

        Raises:
            AnswerError: it is another one, the consent is not the site's, or nobody asked for it.
            StorageError: no room here.
        """
        if self._keeping is None:
            raise AnswerError("malformed", "a consent came in a round whose models nobody keeps")
        self._exchange.require_given(consent)
        model = own_model(self._keeping.shared, delta)
        if digest_of(model) != consent.model:
            raise AnswerError("malformed", "the site consents to another model than it sent")
        self._keeping.models.keep(LetGo(consent=consent, roll=self._keeping.roll), model)

    def _check_patients(self, node: int, claimed: int | None) -> None:
        """A site weighs at most what it enlisted with: nobody takes a round over by claiming more.

        It may be fewer: patients withdraw, and few of them are withheld.
        """
        if claimed is None:
            return
        enlisted = self._roster.patients_of(node)
        if claimed < 1:
            raise AnswerError("data", "the site has no training patients")
        if enlisted is None or claimed > enlisted:
            raise AnswerError(
                "data", f"the site enlisted with {enlisted} training patients and claims {claimed}"
            )

    def _fail(self, failure: SiteFailure) -> None:
        """Name a site that gave no answer that counts; one that has given one stays counted."""
        at = self._position
        logger.warning("round %s %s: %s: %s", at.round, at.stage, failure.site, failure.reason)
        if failure.site not in self._answers:
            self._failures[failure.site] = failure
            self._observe(SiteFailed(at.round, at.stage, failure, at.owner))


def _data_of(message: Arrival) -> bytes:
    """The opaque bytes of a reply, or the reason why there are none."""
    if message is None:
        raise AnswerError("timeout", "no answer came before the round's time was up")
    if isinstance(message, AnswerError):
        raise message
    if message.has_error():
        code = _FLOWER_CODES.get(message.error.code, "crashed")
        raise AnswerError(code, f"Flower reports code {message.error.code} for this site")
    try:
        return unwrap(message)
    except TrustError as error:
        raise AnswerError("malformed", str(error)) from None


def _answer_of(header: AnswerHeader, size: int) -> SiteAnswer:
    """What the record keeps of an answer."""
    answer = SiteAnswer(site=header.site, patients=0, bytes_up=size, head=header.head)
    body = header.body
    said: dict[str, Any] = {}
    if isinstance(body, Trained):
        own = None if body.consent is None else body.consent.model
        said = {"patients": body.patients, "steps": body.steps, "loss": body.loss, "own": own}
    elif isinstance(body, Enlisted):
        said = {"patients": body.patients.get("train", 0), "labels": body.labels}
    elif isinstance(body, Evaluated):
        said = {"patients": body.patients, "scores": body.scores}
    return answer.model_copy(update=said)
