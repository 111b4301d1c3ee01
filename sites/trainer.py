"""The half of a site that sees patients: `handle(task: bytes) -> bytes`, and nothing else goes out.

Long-lived, so that network and prepared cases stay warm. It takes only tasks of the plan it was
made with; whatever goes wrong, an answer with one coarse code leaves and the reason stays here, in
the site's journal. Training and evaluation are functions of task and cohort: a task that comes
again gives the same answer. Under a guarantee they are functions of noise as well: nothing is done
that the hospital's ledger did not pay for, and a task that comes again gets the stored answer. The
last task brings the released model, which is stored for use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fedseg.aggregation.ownmodels import own_model
from fedseg.arrays import Arrays, digest_of
from fedseg.durable import Buffer
from fedseg.errors import (
    DataError,
    FedsegError,
    NotFiniteError,
    PlanError,
    PrivacyError,
    TrustError,
)
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.evaluation.private import measurable, noised_means
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.learning.local import RoundOutcome
from fedseg.learning.private import prepare, train_round_privately
from fedseg.learning.strategies import (
    Memory,
    begun_from,
    train_by_strategy,
    used_here,
    what_changed,
)
from fedseg.logs import without_its_text
from fedseg.modelfile import load_model, save_model
from fedseg.models.parts import freeze, require_division
from fedseg.models.zoo import build_network, load_tensors
from fedseg.plan import StudyPlan
from fedseg.privacy.noise import Noise
from fedseg.reports.card import card_of_model
from fedseg.reports.cardpage import write_card
from fedseg.result import PatientScores
from fedseg.security.consent import Consent
from fedseg.updates import (
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Received,
    RefusalCode,
    Refused,
    TaskHeader,
    Trained,
    open_controlled_task,
    seal_answer,
    task_digest,
)
from sites.egress import means, permitted
from sites.journal import Journal
from sites.patients import PreparedPatients
from sites.spending import Account, reservation_of
from sites.state import Memories

logger = logging.getLogger(__name__)


class Trainer:
    """One hospital's trainer for one study."""

    def __init__(
        self,
        plan: StudyPlan,
        cohort: Cohort,
        cache: CaseCache,
        folder: Path,
        *,
        models: Path,
        left_out: int = 0,
        device: str = "cpu",
        account: Account | None = None,
        noise: Callable[[str], Noise] | None = None,
        suppress_below: int | None = None,
        vouch: Callable[[str], Consent | None] = lambda _model: None,
    ) -> None:
        """Make a trainer.

        Args:
            plan: what the hospital approved; it has an initial model.
            cohort: the site's usable cases of all splits.
            cache: where prepared cases are kept.
            folder: the site's own place for what it remembers of rounds, and its journal.
            models: where released models are kept, a file a study.
            left_out: cases that the check found unusable; only their number is told.
            device: of torch.
            account: what private work is paid from; a plan with a guarantee needs one.
            noise: purpose -> source of chance; by default the operating system's. A seeded one
                gives no privacy.
            suppress_below: the hospital's own least number of patients for suppressed numbers.
            vouch: digest of the hospital's own model -> its consent that it is measured elsewhere,
                or None; asked in the last round of a plan that measures own models.

        Raises:
            PlanError: the network has nothing to train as the plan says, or its patients' gradients
                cannot be told apart.
            PrivacyError: no account for a private plan, or one that does not cover the cohort.
        """
        self._plan, self._cohort, self._left_out = plan, cohort, left_out
        self._account, self._suppress_below, self._vouch = account, suppress_below, vouch
        self._noise = noise or (lambda _purpose: Noise.from_system())
        if plan.private is not None:
            self._paid.require_registered(cohort)
            cohort.require_annotated_alike()
        self._network = build_network(plan.model, plan.task).to(torch.device(device))
        freeze(self._network, plan.training.trainable)
        require_division(self._network, plan)
        self._how = None if plan.private is None else prepare(self._network, plan)
        self._patients = PreparedPatients(cohort.split("train"), cache)
        self._cache = cache
        self._memories = Memories(folder / "state", plan)
        self._journal = Journal(folder / "journal.jsonl")
        self._model_file = models / f"{plan.study}.safetensors"
        self._lock = threading.Lock()

    @property
    def training_patients(self) -> int:
        """How many patients it trains on; who withdrew before it was made is none of them."""
        return len(self._patients)

    def handle(self, task: Buffer) -> bytes:
        """Answer one task. Never raises: a refusal is an answer with one coarse code."""
        with self._lock:
            delta: Arrays | None = None
            head: str | None = None
            body: Body
            try:
                body, delta = self._work(task)
                head = None if self._plan.private is None else self._paid.head
            except Exception as error:
                refused = Refused(code=_code_of(error))
                self._note(refused, error)
                body, delta = permitted(refused, self._plan), None
            header = AnswerHeader(
                task=task_digest(task), site=self._cohort.site, body=body, head=head
            )
            return seal_answer(header, delta, self._plan)

    def _work(self, task: Buffer) -> tuple[Body, Arrays | None]:
        """Open a task and do what its stage asks for."""
        header, model, control = open_controlled_task(task, self._plan)
        if self._plan.private is not None:
            self._paid.acknowledge(header.heads.get(self._cohort.site))
        if header.stage == "enlist":
            return self._permitted(self._enlist()), None
        if header.stage == "release":
            return self._permitted(self._receive(header, model)), None
        if self._plan.private is not None:
            return self._privately(header, model)
        if header.stage in ("evaluate", "own"):
            return self._permitted(self._evaluate(header, model)), None
        body, delta = self._train(header, model, control)
        return self._permitted(body), delta

    def _privately(self, header: TaskHeader, model: Arrays) -> tuple[Body, Arrays | None]:
        """Training and noised metrics are paid for; what leaves as it is, no guarantee covers."""
        if header.stage == "train":
            answer = self._paid.answer(header, lambda: self._train_privately(header, model))
            self._memories.accept(header.round, reservation_of(header))
            return answer
        if self._plan.privacy.outputs.metrics == "noised":
            return self._paid.answer(header, lambda: self._evaluate_privately(header, model))
        return self._permitted(self._evaluate_quietly(header, model)), None

    def _permitted(self, body: Body) -> Body:
        """What of a body leaves."""
        return permitted(body, self._plan, self._suppress_below, self._cohort.annotated)

    @property
    def _paid(self) -> Account:
        """The account of a private plan."""
        if self._account is None:
            raise PrivacyError(
                "a plan with a guarantee is trained from an account in the hospital's ledger "
                "alone, and there is none: nothing is charged, so nothing is computed"
            )
        return self._account

    def _note(self, refused: Refused, error: Exception) -> None:
        """Keep the reason of a refusal here; a full disk must not turn it into silence."""
        if not isinstance(error, FedsegError):
            said = "a task failed for a reason that fedseg does not know; its journal has the text"
            logger.error(said, extra=without_its_text(error))
        try:
            self._journal.write("refused", code=refused.code, reason=f"{error}")
        except OSError:
            logger.exception("the journal cannot be written: make room or mend its rights")

    def _enlist(self) -> Enlisted:
        """Say what the cohort brings, and with which labels."""
        parts = {name: self._cohort.split(name) for name in ("train", "val", "test")}
        self._journal.write("enlisted")
        return Enlisted(
            patients={name: len(part.patients) for name, part in parts.items()},
            cases={name: len(part.cases) for name, part in parts.items()},
            left_out=self._left_out,
            labels=self._cohort.annotated,
        )

    def _train(self, header: TaskHeader, model: Arrays, control: Arrays) -> tuple[Trained, Arrays]:
        """Train one round from the task's model, as the plan's strategy says."""
        memory, spent = self._memories.before(header.round), self._clock()
        outcome, delta, kept = train_by_strategy(
            self._network,
            self._patients,
            self._plan,
            round_=header.round,
            site=self._cohort.site,
            model=model,
            control=control,
            memory=memory,
        )
        self._memories.store(header.round, kept)
        consent = self._consent(header, model, delta)
        return self._trained(header, outcome, spent(), consent), delta

    def _train_privately(self, header: TaskHeader, model: Arrays) -> tuple[Body, Arrays | None]:
        """Train one private round; the answer is what leaves, whatever the round came to."""
        assert self._how is not None  # a private plan's trainer has it
        self._paid.require_registered(self._cohort)  # once more: from the debit on it is frozen
        gone = self._paid.withdrawn(self._patients)
        memory, spent = self._memories.before(header.round), self._clock()
        load_tensors(self._network, begun_from(model, memory))
        try:
            outcome = train_round_privately(
                self._network,
                self._patients.without(gone),
                self._plan,
                round_=header.round,
                site=self._cohort.site,
                noise=self._noise(self._purpose(header)),
                how=self._how,
                annotated=self._cohort.annotated,
                optimiser_state=memory.optimiser or None,
                anchor=model,
            )
        except NotFiniteError as error:  # noise has seen to it: a second try is a second release
            self._memories.propose(header.round, reservation_of(header), Memory())
            refused = Refused(code=_code_of(error))
            self._note(refused, error)
            return self._permitted(refused), None
        delta, personal = what_changed(self._network, self._plan, model)
        kept = Memory(optimiser=outcome.optimiser_state, personal=personal)
        self._memories.propose(header.round, reservation_of(header), kept)
        consent = self._consent(header, model, delta)
        body = self._trained(header, outcome, spent(), consent, lost=outcome.lost)
        return self._permitted(body), delta

    def _consent(self, header: TaskHeader, model: Arrays, delta: Arrays) -> Consent | None:
        """Whether this hospital's own model may be measured elsewhere, where the plan asks that."""
        if not self._plan.lets_own_models_go(header.round):
            return None
        consent = self._vouch(digest_of(own_model(model, delta)))
        if consent is not None:
            self._journal.write("own_model_let_go", round=header.round, model=consent.model)
        return consent

    def _trained(
        self,
        header: TaskHeader,
        outcome: RoundOutcome,
        cpu_s: float,
        consent: Consent | None,
        **facts: int,
    ) -> Trained:
        """What a round says."""
        self._journal.write(
            "trained", round=header.round, steps=outcome.steps, cpu_s=round(cpu_s, 4), **facts
        )
        patients = len(self._patients)
        return Trained(patients=patients, steps=outcome.steps, loss=outcome.loss, consent=consent)

    def _clock(self) -> Callable[[], float]:
        """CPU seconds of training from now on."""
        clock = time.thread_time if self._plan.training.threads == 1 else time.process_time
        started = clock()
        return lambda: clock() - started

    def _purpose(self, header: TaskHeader) -> str:
        """What noise is for: one site's part in one stage of one round."""
        return f"{self._cohort.site} {header.round} {header.stage}"

    def _evaluate(self, header: TaskHeader, model: Arrays) -> Evaluated:
        """Mean metrics over the site's `val` patients, of the model as it is used here."""
        load_tensors(self._network, used_here(model, self._memories.before(header.round + 1)))
        held_back = self._cohort.split("val")
        metrics = self._plan.evaluation.metrics
        patients = evaluate_cohort(self._network, held_back, self._cache, self._plan, metrics)
        scores = means(patients, self._plan, self._suppress_below)
        self._evaluated(header, patients)
        return Evaluated(patients=len(patients), scores=scores)

    def _evaluate_privately(self, header: TaskHeader, model: Arrays) -> tuple[Body, None]:
        """Metrics over the `val` patients, with noise, over a number that the plan declares."""
        self._paid.require_registered(self._cohort)  # as above
        patients = self._measured(header, model)
        noise = self._noise(self._purpose(header))
        scores = noised_means(patients, self._plan, noise, self._cohort.annotated)
        self._evaluated(header, patients)
        return self._permitted(Evaluated(patients=len(patients), scores=scores)), None

    def _evaluate_quietly(self, header: TaskHeader, model: Arrays) -> Evaluated:
        """Metrics of a private plan that its guarantee does not cover, if they leave at all."""
        leave = self._plan.privacy.outputs.metrics != "none"
        patients = self._measured(header, model) if leave else []
        scores = means(patients, self._plan, self._suppress_below)
        self._evaluated(header, patients)
        return Evaluated(patients=len(patients), scores=scores)

    def _measured(self, header: TaskHeader, model: Arrays) -> list[PatientScores]:
        """The scores of the `val` patients who can be measured and have not withdrawn."""
        load_tensors(self._network, used_here(model, self._memories.before(header.round + 1)))
        held_back = self._cohort.split("val")
        gone = self._paid.withdrawn(held_back.patients)
        held_back = held_back.without(c.name for c in held_back.cases if c.patient in gone)
        return measurable(self._network, held_back, self._cache, self._plan)

    def _evaluated(self, header: TaskHeader, patients: Sequence[PatientScores]) -> None:
        """Note what was measured, and whose model it was if it was one hospital's."""
        owner = {} if header.owner is None else {"owner": header.owner}
        self._journal.write("evaluated", round=header.round, patients=len(patients), **owner)

    def _receive(self, header: TaskHeader, model: Arrays) -> Received:
        """Store the released model where the hospital finds it, once it fits the network."""
        load_tensors(self._network, model)
        self._refuse_another(self._model_file, header)
        memory = self._memories.before(header.round + 1)
        usable, personal = begun_from(model, memory), bool(memory.personal)
        self._keep(self._model_file, usable, header, personal=personal)
        if memory.own:
            own = self._model_file.with_name(f"{self._plan.study}-own.safetensors")
            self._keep(own, memory.own, header, personal=True)
        self._journal.write("received", round=header.round, model=header.model)
        return Received(model=digest_of(model))

    def _keep(self, path: Path, model: Arrays, header: TaskHeader, *, personal: bool) -> None:
        """Write a model and, beside it, its card: what a hospital knows of it."""
        told = save_model(
            path,
            self._plan,
            model,
            arm="personal" if personal else "federated",
            rounds=header.round,
            seeded=self._plan.private is not None and not self._noise("release").private,
            released=header.model if personal else None,
        )
        write_card(card_of_model(told, path.name), path.with_name(f"{path.stem}-card.md"))

    def _refuse_another(self, path: Path, header: TaskHeader) -> None:
        """A study has one final model: who has the study key cannot exchange it in use."""
        if not path.exists():
            return
        stored = load_model(path)[0]
        received = stored.released or stored.model_digest
        if stored.plan_digest == header.plan and received != header.model:
            raise TrustError(
                "another final model of this study came than the one that is kept in "
                f"models/{path.name}; move that file away if the consortium says that it was wrong"
            )


def _code_of(error: Exception) -> RefusalCode:
    """The coarse code that leaves."""
    codes: tuple[tuple[type[Exception], RefusalCode], ...] = (
        (PlanError, "plan"),
        (PrivacyError, "plan"),
        (TrustError, "task"),
        (DataError, "data"),
        (NotFiniteError, "not_finite"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "failed")
