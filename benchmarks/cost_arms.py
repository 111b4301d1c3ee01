"""The arms of federation_cost.py: each runs one federation, or none, in a process of its own.

    python benchmarks/cost_arms.py ARM WORK OUT

WORK holds the phantoms, their prepared cases and the built plan that `prepare` left there; all arms
take the same gradient steps on the same patches from the same first model. Every arm marks where
its start-up ends and its last line says how many steps it took and each site's loss in round 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import mark

Losses = dict[str, float]
Said = tuple[int, Losses]


def prepare(work: Path, *, patients: int, settings: dict[str, Any]) -> None:
    """Make phantoms, prepared cases and a built plan."""
    from fedseg.imaging.cache import CaseCache
    from fedseg.imaging.phantoms import phantom_task, write_phantoms
    from fedseg.models.zoo import initial_model
    from fedseg.plan import StudyPlan

    data = write_phantoms(work / "data", patients_per_site=patients, shape=(40, 56, 40))
    task = phantom_task("MR").model_copy(update={"patch_size": tuple(settings.pop("patch"))})
    plan = StudyPlan.model_validate({"study": "cost", "task": task.model_dump(), **settings})
    record, tensors = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    cache = CaseCache(work / "cache", task)
    for cohort in _cohorts(data, plan):
        for case in cohort.cases:
            cache.load(case)
    _save(work / "initial.npz", tensors)
    (work / "plan.json").write_bytes(plan.canonical_bytes)


def plain(work: Path, _out: Path) -> Said:
    """The loop that one writes without a federation: site after site, round after round."""
    import numpy as np
    import torch

    from fedseg.arrays import seed_for
    from fedseg.imaging.cache import CaseCache
    from fedseg.learning.augment import augment, margin_of
    from fedseg.learning.losses import dice_ce_per_patient
    from fedseg.learning.sampling import PatchSampler, draw_patients
    from fedseg.models.zoo import build_network, load_tensors
    from fedseg.rates import learning_rate

    plan, initial, cohorts = _study(work)
    task, training, rounds = plan.task, plan.training, plan.aggregation.rounds
    size, count = training.batch_size, training.batch_size * training.steps_per_round
    torch.set_num_threads(1)
    cache = CaseCache(work / "cache", task)
    margin = margin_of(task.patch_size, task.spacing_mm, training.augmentation)
    mark("ready")
    steps, first = 0, {}
    for cohort in cohorts:
        network = build_network(plan.model, task)
        load_tensors(network, initial)
        optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=training.optimiser.learning_rate,
            weight_decay=training.optimiser.weight_decay,
            fused=True,
        )
        cases = {name: [cache.load(case) for case in own] for name, own in cohort.by_patient()}
        sampler = PatchSampler(cases, task.patch_size, margin, training.foreground_share)
        network.train()
        for round_ in range(1, rounds + 1):
            rng = np.random.default_rng(seed_for(training.seed, cohort.site, round_, "patches"))
            names = draw_patients(
                list(cases),
                first=(round_ - 1) * count,
                count=count,
                seed=training.seed,
                site=cohort.site,
            )
            losses = []
            for step in range(training.steps_per_round):
                drawn = [sampler.draw(n, rng) for n in names[step * size : (step + 1) * size]]
                images, labels = augment(
                    torch.from_numpy(np.stack([image for image, _ in drawn])),
                    torch.from_numpy(np.stack([label for _, label in drawn])),
                    margin=margin,
                    spacing_mm=task.spacing_mm,
                    settings=training.augmentation,
                    rng=rng,
                )
                optimiser.zero_grad(set_to_none=True)
                loss = dice_ce_per_patient(network(images), labels).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clip_norm)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(plan, round_, step)
                optimiser.step()
                losses.append(float(loss.detach()))
                steps += 1
            if round_ == 1:
                first[cohort.site] = float(np.mean(losses))
    return steps, first


def inprocess(work: Path, out: Path) -> Said:
    """The federation of fedseg in one process."""
    return _fedseg(work, out, "inprocess")


def ray(work: Path, out: Path) -> Said:
    """The same federation on Ray."""
    return _fedseg(work, out, "ray")


def flower(work: Path, _out: Path) -> Said:
    """Flower's own FedAvg strategy and message types on Ray, around fedseg's training function."""
    import logging

    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    plan, initial, cohorts = _study(work)
    sites = [cohort.site for cohort in cohorts]
    client = ClientApp()

    @client.query("warm")
    def warm(message: Message, context: Context) -> Message:
        site_trainer(work, sites[int(context.node_config["partition-id"])])
        return Message(content=RecordDict(), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch  # noqa: F401 - Flower looks for it among the imported modules

        site = sites[int(context.node_config["partition-id"])]
        round_ = int(message.content["config"]["server-round"])
        weights = message.content["arrays"].to_torch_state_dict()
        trained, outcome, patients = site_trainer(work, site)(weights, round_)
        metrics = {"num-examples": patients, "loss": outcome.loss, "steps": outcome.steps}
        metrics["site"] = sites.index(site)
        reply = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord(metrics)})
        return Message(content=reply, reply_to=message)

    server = ServerApp()
    steps, first = 0, {}

    class Counting(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            nonlocal steps
            replies = list(replies)
            for reply in replies:
                said = reply.content["metrics"]
                steps += int(said["steps"])
                if server_round == 1:
                    first[sites[int(said["site"])]] = float(said["loss"])
            return super().aggregate_train(server_round, replies)

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        everybody = {f"min_{what}_nodes": len(sites) for what in ("train", "available")}
        strategy = Counting(fraction_train=1.0, fraction_evaluate=0.0, **everybody)
        rounds = plan.aggregation.rounds
        record = ArrayRecord(numpy_ndarrays=list(initial.values()))
        record = ArrayRecord(dict(zip(initial, record.values(), strict=True)))
        while len(list(grid.get_node_ids())) < len(sites):
            time.sleep(0.1)
        asked = [
            Message(RecordDict(), dst_node_id=node, message_type="query.warm")
            for node in grid.get_node_ids()
        ]
        assert len(list(grid.send_and_receive(asked))) == len(sites)
        mark("ready")
        strategy.start(
            grid, initial_arrays=record, num_rounds=rounds, train_config=ConfigRecord({})
        )

    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(sites),
        backend_config={
            "init_args": {"include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return steps, first


def nvflare(work: Path, out: Path) -> Said:
    """NVFlare's simulator with its FedAvg, around fedseg's training function."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    plan, _, cohorts = _study(work)
    notes = out / "nvflare"
    notes.mkdir(parents=True)
    recipe = FedAvgRecipe(
        name="cost",
        min_clients=len(cohorts),
        num_rounds=plan.aggregation.rounds,
        model={"path": "cost_arms.first_network", "args": {"work": str(work)}},
        train_script=str(Path(__file__).with_name("cost_nvflare_client.py")),
        train_args=f"{work} {notes}",
    )
    names = [cohort.site for cohort in cohorts]
    environment = SimEnv(clients=names, num_threads=len(names), workspace_root=str(out / "sim"))
    recipe.execute(environment).get_result()
    said = [json.loads(line) for path in notes.iterdir() for line in path.read_text().splitlines()]
    first = {entry["site"]: entry["loss"] for entry in said if entry["round"] == 1}
    return sum(entry["steps"] for entry in said), first


def first_network(work: str) -> Any:
    """The network with the study's first weights, for NVFlare's server."""
    from fedseg.models.zoo import build_network, load_tensors

    plan, initial, _ = _study(Path(work))
    network = build_network(plan.model, plan.task)
    load_tensors(network, initial)
    return network


_TRAINERS: dict[str, Callable[..., Any]] = {}


def site_trainer(work: Path, site: str) -> Callable[..., Any]:
    """A site's training function for other frameworks: (state dict, round) -> trained and said.

    Network, prepared cases and optimiser state stay in the process.
    """
    if site in _TRAINERS:
        return _TRAINERS[site]
    import torch

    from fedseg.imaging.cache import CaseCache
    from fedseg.learning.local import train_round
    from fedseg.models.zoo import build_network
    from sites.patients import PreparedPatients

    plan, _, cohorts = _study(work)
    torch.set_num_threads(1)
    cohort = next(c for c in cohorts if c.site == site)
    patients = PreparedPatients(cohort, CaseCache(work / "cache", plan.task))
    network = build_network(plan.model, plan.task)
    state: dict[str, Any] = {}

    def train(weights: dict[str, Any], round_: int) -> Any:
        network.load_state_dict(weights)
        outcome = train_round(
            network, patients, plan, round_=round_, site=site, optimiser_state=state or None
        )
        state.update(outcome.optimiser_state)
        return network.state_dict(), outcome, len(patients)

    _TRAINERS[site] = train
    return train


def _fedseg(work: Path, out: Path, engine: str) -> Said:
    """What `fedseg simulate` runs, on cohorts without patients to evaluate."""
    import logging

    from coordinator.rounds.events import StageOpened
    from fedseg.simulation.federation import Federation
    from fedseg.simulation.running import run_federation

    logging.getLogger("flwr").setLevel(logging.WARNING)
    plan, initial, cohorts = _study(work)

    def observe(event: Any) -> None:
        if engine == "ray" and isinstance(event, StageOpened) and event.stage == "train":
            mark(f"ready-{event.round}" if event.round > 1 else "ready")

    federation = Federation(plan, initial, cohorts, out / "study", work / "cache")
    if engine == "inprocess":
        import sites.trainer  # noqa: F401 - so that `ready` stands after the imports, as in `plain`

        mark("ready")
    finished = run_federation(federation, engine=engine, observe=observe)
    print(f'\n{{"in_training_s": {finished.cpu_s}}}')
    trained = [stage for stage in finished.state.history if stage.stage == "train"]
    steps = sum(answer.steps for stage in trained for answer in stage.answers)
    return steps, {answer.site: answer.loss for answer in trained[0].answers}


def _study(work: Path) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """What `prepare` left: the plan, the first model and the cohorts, training patients alone."""
    import numpy as np

    from fedseg.plan import load_plan

    plan = load_plan(work / "plan.json")
    with np.load(work / "initial.npz") as file:
        initial = {name: file[name] for name in file.files}
    return plan, initial, _cohorts(work / "data", plan)


def _cohorts(data: Path, plan: Any) -> tuple[Any, ...]:
    """Each hospital's training patients."""
    from fedseg.imaging.manifests import read_manifest

    manifest = read_manifest(data, plan.task)
    return tuple(manifest.cohort(site).split("train") for site in manifest.sites)


def _save(path: Path, tensors: dict[str, Any]) -> None:
    """Named arrays as numpy writes them."""
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **tensors)


ARMS: dict[str, Callable[[Path, Path], Said]] = {
    "plain": plain,
    "inprocess": inprocess,
    "ray": ray,
    "flower": flower,
    "nvflare": nvflare,
}


def main(arguments: Sequence[str]) -> None:
    """Run one arm and say what it did."""
    arm, work, out = arguments
    steps, first = ARMS[arm](Path(work), Path(out))
    mark("end")
    print("\n" + json.dumps({"steps": steps, "first": dict(sorted(first.items()))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
