"""Peak memory of the coordinator as sites grow, with a model of 30 million parameters.

    python benchmarks/coordinator_memory.py [--json] [--sites 2,5,10,20,50] [--rounds 2] [--out DIR]
                                           [--sealed]

For every number of sites a coordinator runs a whole study in a fresh process: the real round loop,
checks, sums, server step and checkpoints (`coordinator.rounds.study.Study`), on a Grid of this
script that gives tasks away as files and hands answers over one at a time as bytes. The answers
are made by other processes, which know the task from its file; every site answers with values of
its own.
Given is VmHWM, the largest resident size that the kernel saw of the coordinator's process, with
Python, numpy and Flower in it; `start` is what these take before a study begins. What Flower's own
transport would hold besides is not in it: see the note on Flower. With --sealed tasks and answers
travel as between hospitals, sealed and signed (`coordinator.sealing.exchange.SealedExchange`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH = 768


def main() -> None:
    """Run what is missing, each number of sites in a process of its own, and print the table."""
    arguments = _parse()
    if arguments.role:
        _ROLES[arguments.role](arguments)
        return
    out = arguments.out or Path(tempfile.mkdtemp(prefix="coordinator-memory-"))
    out.mkdir(parents=True, exist_ok=True)
    note, stamp = out / "settings.json", json.dumps([arguments.parameters, arguments.rounds])
    stamp += " sealed" if arguments.sealed else ""
    if note.exists() and note.read_text() != stamp:
        raise SystemExit(f"{out} holds runs of other settings: give another --out")
    note.write_text(stamp)
    for sites in arguments.sites:
        record = out / f"sites-{sites}.json"
        if not record.exists():
            record.write_text(json.dumps(_measure(arguments, sites, out)))
            print(f"{sites} sites: {record.read_text()}", file=sys.stderr)
    result = summary(arguments, out)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def _measure(arguments: argparse.Namespace, sites: int, out: Path) -> dict[str, Any]:
    """One study: the coordinator, and the processes that answer."""
    with tempfile.TemporaryDirectory(dir=out) as place:
        common = ["--place", place, "--sites", str(sites), "--rounds", str(arguments.rounds)]
        common += ["--parameters", str(arguments.parameters)]
        if arguments.sealed:
            common.append("--sealed")
            _enrol(Path(place), sites)
        command = [sys.executable, __file__, *common, "--role"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        feeder = subprocess.Popen([*command, "sites"], env=environment)
        try:
            done = subprocess.run(
                [*command, "coordinator"], env=environment, check=True, stdout=subprocess.PIPE
            )
        finally:
            feeder.terminate()
            feeder.wait()
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said


def _coordinator(arguments: argparse.Namespace) -> None:
    """The process that is measured."""
    from coordinator.rounds.exchange import Plain
    from coordinator.rounds.study import Study
    from coordinator.sealing.exchange import SealedExchange
    from fedseg.aggregation.checkpoint import save_state
    from fedseg.aggregation.rounds import first_state
    from fedseg.security.keys import load_signing_key

    place, sites = Path(arguments.place), int(arguments.sites[0])
    empty_mb = _status_mb("VmRSS")
    plan, initial = _study(arguments, sites)
    states = [first_state(plan, initial)]
    del initial

    class Store:
        def save(self, state: Any) -> None:
            save_state(place / "checkpoint", plan, state)

    exchange: Any = Plain()
    if arguments.sealed:
        key = load_signing_key(place / "study.key")
        outbox = place / "outbox"
        exchange = SealedExchange(plan, key, registry=place / "registry.json", outbox=outbox)
    study = Study(_grid(place, sites), plan, Store(), nodes=sites, exchange=exchange)
    end = study.run(states.pop())
    answers = sum(len(stage.answers) for stage in end.history if stage.stage == "train")
    assert answers == sites * arguments.rounds, [stage.failures for stage in end.history]
    forbidden = {"torch", "monai", "ray"} & set(sys.modules)
    assert not forbidden, forbidden
    print(
        json.dumps(
            {
                "sites": sites,
                "answers": answers,
                "model_mb": plan.built.nbytes / 1e6,
                "start_mb": empty_mb,
                "peak_mb": _status_mb("VmHWM"),
            }
        )
    )


def _grid(place: Path, sites: int) -> Any:
    """A Grid whose nodes are other processes, reached through files."""
    from flwr.app import Message
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedseg.carriage import unwrap, wrap

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    class FileGrid(Grid):
        """Tasks go out as one file for all nodes; an answer is a file that is read when pulled."""

        pushed = 0
        run = None

        def set_run(self, run: Any) -> None:
            """There is one run."""

        def create_message(self, *_: Any, **__: Any) -> Message:
            """Not used."""
            raise NotImplementedError

        def get_node_ids(self) -> list[int]:
            """The nodes, from 1."""
            return list(range(1, sites + 1))

        def push_messages(self, messages: Any) -> list[str]:
            """Give the task away; nothing of it is kept."""
            self.pushed += 1
            first, *_ = messages = list(messages)
            _appear(place / f"task-{self.pushed}", unwrap(first))
            self._waiting = {
                f"{self.pushed}-{m.metadata.dst_node_id}": m.metadata for m in messages
            }
            return list(self._waiting)

        def pull_messages(self, message_ids: Any) -> list[Message]:
            """One answer, as soon as its file is there."""
            (message_id,) = message_ids
            path = place / f"answer-{message_id}"
            if not path.exists():
                return []
            metadata = self._waiting.pop(message_id)
            sent = Message(
                wrap(b""), dst_node_id=metadata.dst_node_id, message_type=metadata.message_type
            )
            sent.metadata.__dict__["_message_id"] = message_id
            answer = Message(wrap(path.read_bytes()), reply_to=sent)
            path.unlink()
            return [answer]

        def send_and_receive(self, *_: Any, **__: Any) -> list[Message]:
            """Not used."""
            raise NotImplementedError

    return FileGrid()


def _sites(arguments: argparse.Namespace) -> None:
    """The other side: answer every task for every site, a few answers ahead of the coordinator."""
    import time

    import numpy as np

    from fedseg.updates import (
        AnswerHeader,
        Enlisted,
        Evaluated,
        Received,
        Trained,
        open_task,
        seal_answer,
        task_digest,
    )

    place, sites = Path(arguments.place), int(arguments.sites[0])
    plan, _ = _study(arguments, sites)
    bodies = {
        "enlist": Enlisted(patients={"train": 5}, cases={"train": 5}, left_out=0),
        "train": Trained(patients=5, steps=20, loss=0.5),
        "evaluate": Evaluated(patients=0, scores={}),
    }
    number = 0
    while True:
        number += 1
        path = place / f"task-{number}"
        while not path.exists():
            time.sleep(0.01)
        sent = path.read_bytes()
        path.unlink()
        task = _unsealed(place, sent) if arguments.sealed else sent
        header, model = open_task(task, plan)
        if header.stage == "release":
            bodies["release"] = Received(model=header.model)
        for node in range(1, sites + 1):
            delta = {}
            if header.stage == "train":
                rng = np.random.default_rng([number, node])
                delta = {k: rng.random(a.shape, np.float32) * 0.01 for k, a in model.items()}
            answer = AnswerHeader(
                task=task_digest(task), site=f"site-{node}", body=bodies[header.stage]
            )
            while len(list(place.glob("answer-*"))) >= 4:
                time.sleep(0.01)
            data = seal_answer(answer, delta)
            if arguments.sealed:
                data = _sealed(place, data, sent, node)
            _appear(place / f"answer-{number}-{node}", data)


def _enrol(place: Path, sites: int) -> None:
    """Keys of a study and its sites, and the registry."""
    from fedseg.security.identity import Roll, SiteIdentity, sign_roll
    from fedseg.security.keys import ReceivingKey, SigningKey, save_key
    from fedseg.security.nodekeys import make_node_key

    study, identities = SigningKey.generate(), []
    save_key(place / "study.key", study)
    for node in range(1, sites + 1):
        signing, receiving = SigningKey.generate(), ReceivingKey.generate()
        save_key(place / f"{node}.signing", signing)
        save_key(place / f"{node}.receiving", receiving)
        line = make_node_key(place / f"{node}.node")
        keys = {"signing": signing.public.text, "sealing": receiving.public.text, "node": line}
        identities.append(SiteIdentity(name=f"site-{node}", **keys))
    roll = Roll(
        study="memory",
        version=1,
        issued="2026-01-01T00:00:00+00:00",
        valid_until="2036-01-01T00:00:00+00:00",
        sites=tuple(sorted(identities, key=lambda site: site.name)),
    )
    (place / "registry.json").write_bytes(sign_roll(roll, study).canonical_bytes)


def _unsealed(place: Path, envelope: bytes) -> bytes:
    """The task, as the first site opens it."""
    from fedseg.security.envelope import open_bytes
    from fedseg.security.keys import load_receiving_key, load_signing_key

    study, key = load_signing_key(place / "study.key"), load_receiving_key(place / "1.receiving")
    expected: dict[str, Any] = {"kind": "task", "study": "memory", "signer": study.public}
    expected |= {"recipient": "site-1", "key": key, "max_bytes": 2**40}
    return open_bytes(envelope, **expected)[1]


def _sealed(place: Path, answer: bytes, task: bytes, node: int) -> bytes:
    """An answer as one site seals it."""
    import io

    from fedseg.security.envelope import read_header, seal_bytes
    from fedseg.security.keys import SealingKey, load_signing_key

    asked = read_header(io.BytesIO(task), max_bytes=2**40)
    fields: dict[str, Any] = {name: getattr(asked, name) for name in ("study", "plan", "roll")}
    fields |= {"kind": "answer", "about": asked.about, "sender": f"site-{node}"}
    fields["recipients"] = {"coordinator": SealingKey.from_text(asked.reply_to or "")}
    return seal_bytes(answer, signer=load_signing_key(place / f"{node}.signing"), **fields)


_ROLES = {"coordinator": _coordinator, "sites": _sites}


def _study(arguments: argparse.Namespace, sites: int) -> tuple[Any, dict[str, Any]]:
    """A plan and a model of about the wanted size, in layers as large as a U-Net's largest."""
    import numpy as np

    from fedseg.arrays import digest_of, schema_of
    from fedseg.plan import StudyPlan

    layers = max(1, round(arguments.parameters / (WIDTH * WIDTH)))
    shape, kind = (WIDTH, WIDTH), np.float32
    initial = {f"layer.{i:03d}.weight": np.full(shape, 0.01, kind) for i in range(layers)}
    record = {
        "digest": digest_of(initial),
        "tensors": [spec.model_dump() for spec in schema_of(initial)],
    }
    plan = StudyPlan.model_validate(
        {
            "study": "memory",
            "task": {
                "dimensions": 3,
                "channels": [{"name": "T1w", "modality": "MR"}],
                "labels": {"organ": 1},
                "spacing_mm": [1, 1, 1],
                "patch_size": [64, 64, 64],
            },
            "model": {"network": "large"},
            "training": {"schedule": {"name": "constant", "warmup_rounds": 0}},
            "aggregation": {"rounds": arguments.rounds, "minimum_sites": min(sites, 3)},
            "evaluation": {"every_rounds": arguments.rounds},
            "initial": record,
        }
    )
    return plan, initial


def _appear(path: Path, data: bytes) -> None:
    """Write a file that is whole as soon as it is there."""
    draft = path.with_name("." + path.name)
    draft.write_bytes(data)
    draft.replace(path)


def _status_mb(field: str) -> float:
    """A size from /proc/self/status, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("this benchmark reads /proc, which this system does not have")


def summary(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All runs, and how much the peak grows with the sites."""
    runs = [json.loads((out / f"sites-{sites}.json").read_text()) for sites in arguments.sites]
    model = runs[0]["model_mb"]
    for run in runs:
        run["peak_models"] = round(run["peak_mb"] / model, 2)
        run["study_models"] = round((run["peak_mb"] - run["start_mb"]) / model, 2)
    growth = runs[-1]["peak_mb"] - runs[0]["peak_mb"]
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "settings": {"model_mb": round(model, 1), "rounds": arguments.rounds},
        "runs": runs,
        "growth_mb": round(growth, 1),
        "growth_models": round(growth / model, 3),
        "aim": {"growth_models_below": 1.0},
    }


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [
        f"{result['date']}, {result['machine']}; model {result['settings']['model_mb']} MB, "
        f"{result['settings']['rounds']} rounds",
        f"{'sites':>5} {'peak MB':>8} {'in models':>9} {'less start':>10} {'start MB':>8}",
    ]
    lines += [
        f"{run['sites']:5d} {run['peak_mb']:8.0f} {run['peak_models']:9.2f} "
        f"{run['study_models']:10.2f} {run['start_mb']:8.0f}"
        for run in result["runs"]
    ]
    first, last = result["runs"][0]["sites"], result["runs"][-1]["sites"]
    lines.append(
        f"from {first} to {last} sites: {result['growth_mb']:+.1f} MB, "
        f"{result['growth_models']:+.3f} models (must be below 1)"
    )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sealed", action="store_true", help="as between hospitals")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--sites", type=lambda text: [int(n) for n in text.split(",")], default=[2, 5, 10, 20, 50]
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--out", type=Path, help="keeps runs; call again to resume")
    parser.add_argument("--role", choices=list(_ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
