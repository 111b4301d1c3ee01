"""What per-patient clipping costs: one step of U-Nets, by method, in CPU time and memory.

    python benchmarks/private_step.py [--json] [--rows NAME,...] [--methods NAME,...] [--steps 5]
    python benchmarks/private_step.py --out FILE     # a row is kept as it ends; go on by the same
    python benchmarks/private_step.py --profile [--rows NAME,...]   # where ours takes its time

Each method has a process of its own with one thread; they take their steps in turn, so that a busy
machine is busy for all of them. `cpu_s` is the median step's process time after one step of warm-up
(forward, per-patient loss, backward, clipped sum; no noise, no optimiser), `peak_mb` VmHWM of the
process, and `start_mb` what it held before its first step, the network included. Each sample is a
patient; `load` is the machine's load average as the row ended. A method that fails has `error`
instead, and so has one whose process was ended for want of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

HERE = Path(__file__).resolve().parent
CLIP = 0.1

# dims, channels, batch, size of a side; two residual units and instance norm
ROWS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "2d-tiny": (2, (8, 16), 2, 16),
    "2d-1.6M-b2": (2, (16, 32, 64, 128, 256), 2, 128),
    "2d-1.6M-b8": (2, (16, 32, 64, 128, 256), 8, 128),
    "2d-1.6M-b16": (2, (16, 32, 64, 128, 256), 16, 128),
    "2d-6M-b8": (2, (32, 64, 128, 256, 512), 8, 128),
    "2d-26M-b4": (2, (64, 128, 256, 512, 1024), 4, 128),
    "3d-1.2M-b4": (3, (16, 32, 64, 128), 4, 32),
    "3d-1.2M-b16": (3, (16, 32, 64, 128), 16, 32),
    "3d-1.2M-b4-64": (3, (16, 32, 64, 128), 4, 64),
    "3d-4.8M-b2-64": (3, (16, 32, 64, 128, 256), 2, 64),
    "3d-19M-b4": (3, (32, 64, 128, 256, 512), 4, 32),
    "3d-19M-b2-64": (3, (32, 64, 128, 256, 512), 2, 64),
}


def main() -> None:
    """Measure the rows and print them."""
    arguments = _parse()
    if arguments.worker:
        _work(arguments.rows[0], arguments.worker)
        return
    if arguments.profile:
        _profile(arguments.rows, arguments.steps)
        return
    found = _kept(arguments.out, arguments.steps)
    for number, row in enumerate(arguments.rows, 1):
        have = {r["method"] for r in found if r["network"] == row}
        if have >= set(arguments.methods):
            continue
        print(f"row {number} of {len(arguments.rows)}: {row}", file=sys.stderr, flush=True)
        new = _measure(row, arguments.methods, arguments.steps)
        found = [r for r in found if r["network"] != row] + new
        _keep(arguments.out, arguments.steps, found)
    print(json.dumps({"rows": found}, indent=2) if arguments.json else _table(found))


def _kept(out: Path | None, steps: int) -> list[dict[str, Any]]:
    """The rows that an earlier run left."""
    if out is None or not out.exists():
        return []
    kept = json.loads(out.read_text())
    if kept["steps"] != steps:
        raise SystemExit(f"{out} holds medians of {kept['steps']} steps: give --steps or another")
    return cast(list[dict[str, Any]], kept["rows"])


def _keep(out: Path | None, steps: int, rows: list[dict[str, Any]]) -> None:
    """Replace the file whole."""
    if out is not None:
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps({"steps": steps, "rows": rows}, indent=1))
        new.replace(out)


def _profile(rows: list[str], steps: int) -> None:
    """Print where each row's private step takes longer, and where less long, than the plain one."""
    import torch
    from private_profile import explain

    torch.set_num_threads(1)
    for row in rows:
        network, data, losses = _build(row)
        print(f"{row}\n{explain(network, data, losses, CLIP, steps)}\n", flush=True)


def _measure(row: str, methods: list[str], steps: int) -> list[dict[str, Any]]:
    """One row: a process for each method, a step of each in turn."""
    dims, _, batch, size = ROWS[row]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__, "--rows", row, "--worker"]
    workers = {
        method: subprocess.Popen(
            [*command, method], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for method in methods
    }  # fmt: skip
    times: dict[str, list[float]] = {method: [] for method in methods}
    said: dict[str, dict[str, Any]] = {}
    for _ in range(steps + 1):
        for method, worker in workers.items():
            if "error" not in said.get(method, {}):
                said[method] = _ask(worker)
                times[method].append(said[method].get("cpu_s", 0.0))
    for worker in workers.values():
        worker.communicate()
    load = round(os.getloadavg()[0], 1)
    common = {"network": row, "dims": dims, "batch": batch, "size": size, "load": load}
    rows = []
    for method in methods:
        own = {**common, "method": method, **said[method]}
        if "error" not in own:
            own["cpu_s"] = round(statistics.median(times[method][1:]), 4)
        rows.append(own)
    return rows


def _ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """One step of one worker."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write("step\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    return cast(dict[str, Any], json.loads(line)) if line else {"error": "the process ended"}


def _work(row: str, method: str) -> None:
    """The process of one method: a step for each line."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    network, data, losses = _build(row)
    step = _METHODS[method](network, data, losses)
    start = _memory("VmRSS")
    for _ in sys.stdin:
        begin = time.process_time()
        try:
            step()
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), flush=True)
            return
        spent = time.process_time() - begin
        parameters = sum(p.numel() for p in network.parameters())
        said = {"cpu_s": spent, "peak_mb": _memory("VmHWM"), "start_mb": start}
        print(json.dumps({**said, "parameters": parameters}), flush=True)


def _build(row: str) -> tuple[Any, Any, Any]:
    """Network, batch and loss."""
    import torch

    from fedseg.learning.losses import dice_ce_per_patient
    from fedseg.models.unet import build_unet
    from fedseg.network import UNetOptions
    from fedseg.task import Task

    dims, channels, batch, size = ROWS[row]
    torch.manual_seed(0)
    task = SimpleNamespace(labels={1: "a", 2: "b"}, channels=["x"], dimensions=dims)
    network = build_unet(cast(Task, task), UNetOptions(channels=channels, residual_units=2))
    images = torch.randn(batch, 1, *(size,) * dims)
    labels = torch.randint(0, 3, (batch, *(size,) * dims))
    return network, (images, labels), dice_ce_per_patient


def _plain(network: Any, data: Any, losses: Any) -> Callable[[], object]:
    def step() -> None:
        network.zero_grad()
        losses(network(data[0]), data[1]).mean().backward()

    return step


def _ours(method: Any) -> Callable[[Any, Any, Any], Callable[[], object]]:
    def build(network: Any, data: Any, losses: Any) -> Callable[[], object]:
        import torch

        from fedseg.learning.persample.clipped import clipped_sum

        patients = torch.arange(len(data[0]))
        return lambda: clipped_sum(network, losses, data, patients, CLIP, method=method)

    return build


def _opacus(functorch: bool) -> Callable[[Any, Any, Any], Callable[[], object]]:
    def build(network: Any, data: Any, losses: Any) -> Callable[[], object]:
        import torch
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        wrapped = GradSampleModule(
            network, loss_reduction="sum", strict=False, force_functorch=functorch
        )
        optimiser = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=0.0), noise_multiplier=0.0,
            max_grad_norm=CLIP, expected_batch_size=1, loss_reduction="sum",
        )  # fmt: skip

        def step() -> None:
            optimiser.zero_grad()
            losses(wrapped(data[0]), data[1]).sum().backward()
            optimiser.clip_and_accumulate()

        return step

    return build


def _ghost(network: Any, data: Any, losses: Any) -> Callable[[], object]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        network, loss_reduction="sum", strict=False, max_grad_norm=CLIP, use_ghost_clipping=True
    )

    def step() -> None:
        wrapped.enable_hooks()
        wrapped.zero_grad()
        each = losses(wrapped(data[0]), data[1])
        each.sum().backward(retain_graph=True)
        share = wrapped.get_clipping_coef()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (share * each).sum().backward()

    return step


_METHODS: dict[str, Callable[[Any, Any, Any], Callable[[], object]]] = {
    "plain": _plain,
    "ours": _ours("stored"),
    "ours-two-pass": _ours("two-pass"),
    "opacus-hooks": _opacus(functorch=False),
    "opacus-functorch": _opacus(functorch=True),
    "opacus-ghost": _ghost,
    "loop": _ours("loop"),
}


def _memory(field: str) -> int:
    """A field of this process' status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def _table(rows: list[dict[str, Any]]) -> str:
    """CPU time and memory of each method, and over the plain step's."""
    plain = {r["network"]: r["cpu_s"] for r in rows if r["method"] == "plain" and "cpu_s" in r}
    lines = ["network         method             cpu s   x plain   peak MB"]
    for row in rows:
        start = f"{row['network']:<16}{row['method']:<17}"
        if "error" in row:
            lines.append(f"{start}{row['error']}")
            continue
        times = row["cpu_s"] / plain[row["network"]] if row["network"] in plain else float("nan")
        lines.append(f"{start}{row['cpu_s']:>7.3f}{times:>10.2f}{row['peak_mb']:>10}")
    return "\n".join(lines + _summary(rows))


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ours over plain, the best Opacus mode over ours, and memory; networks from a million on."""
    good: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("parameters", 0) >= 1e6:
            good.setdefault(row["network"], {})[row["method"]] = row
    slower, faster, memory = [], [], []
    for found in good.values():
        if not {"plain", "ours"} <= found.keys():
            continue
        ours, plain = found["ours"], found["plain"]
        slower.append(ours["cpu_s"] / plain["cpu_s"])
        gradients_mb = ours["batch"] * ours["parameters"] * 4 / 2**20
        taken = [each["peak_mb"] - each["start_mb"] for each in (ours, plain)]
        memory.append((taken[0] - taken[1]) / gradients_mb)
        opacus = [row["cpu_s"] for method, row in found.items() if method.startswith("opacus")]
        if opacus:
            faster.append(min(opacus) / ours["cpu_s"])
    lines = []
    if slower:
        lines.append(
            f"ours / plain: median {statistics.median(slower):.2f}, worst {max(slower):.2f}"
        )
        lines.append(
            f"memory beyond plain's / a gradient for each patient: worst {max(memory):.2f}"
        )
    if faster:
        lines.append(
            f"best Opacus / ours: median {statistics.median(faster):.2f}, worst {min(faster):.2f}"
        )
    return lines


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=_known(ROWS), default=[r for r in ROWS if r != "2d-tiny"])
    parser.add_argument("--methods", type=_known(_METHODS), default=list(_METHODS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where rows are kept")
    parser.add_argument("--profile", action="store_true", help="of ours, beside plain")
    parser.add_argument("--worker", choices=list(_METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _known(table: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(value: str) -> list[str]:
        names = value.split(",")
        wrong = [name for name in names if name not in table]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(table)}")
        return names

    return parse


if __name__ == "__main__":
    main()
