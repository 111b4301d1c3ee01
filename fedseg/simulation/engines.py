"""What carries a simulation's tasks: Flower in this process, or Flower on Ray.

The two apps are the ones that run for real, and so is everything that they call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from coordinator.app import make_app as make_server_app
from fedseg.errors import MissingExtraError
from fedseg.quiet import QUIET
from fedseg.simulation.federation import Federation
from fedseg.simulation.inprocess import InProcessGrid
from fedseg.simulation.trainers import PARTITION, SimulatedSites, forget_trainers
from sites.app import make_app as make_client_app

Engine = Literal["inprocess", "ray"]
_LOOPBACK = "127.0.0.1"
_QUIET = {
    **QUIET,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: Ray takes 127.0.0.1 for its node
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def serve(
    federation: Federation,
    run: Callable[[Grid], None],
    *,
    engine: Engine = "inprocess",
    arrange: Callable[[list[int]], list[int]] = sorted,
) -> None:
    """Run a coordinator's loop on an engine that has a node for each of the federation's sites.

    Args:
        run: the loop; what it raises is raised here.
        arrange: as in `run_federation`.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    try:
        with _quiet():
            if engine == "ray":
                _run_on_ray(federation, run)
            else:
                run(_inprocess_grid(federation, arrange))
    finally:
        forget_trainers(federation)


def _inprocess_grid(
    federation: Federation, arrange: Callable[[list[int]], list[int]]
) -> InProcessGrid:
    """Our Grid, with a node a site."""
    forget_trainers(federation)
    share = federation.plan.aggregation.round_timeout_s / (len(federation.cohorts) + 1)
    contexts = {
        1000 + i: Context(
            run_id=1,
            node_id=1000 + i,
            node_config={PARTITION: i},
            state=RecordDict(),
            run_config={},
        )
        for i in range(len(federation.cohorts))
    }
    app = make_client_app(SimulatedSites(federation))
    return InProcessGrid(app, contexts, patience_s=share, arrange=arrange)


def _run_on_ray(federation: Federation, run: Callable[[Grid], None]) -> None:
    """Flower's simulation engine: each core's worker serves one node at a time."""
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError:
        raise MissingExtraError("simulation", "ray") from None
    if ray.util.get_node_ip_address() != _LOOPBACK:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "Ray was imported before the study began and would listen on the network: run the "
            "study in a process of its own"
        )
    failure: list[BaseException] = []

    def guarded(grid: Grid) -> None:
        try:
            run(grid)
        except BaseException as error:
            failure.append(error)

    patience_s = federation.plan.aggregation.round_timeout_s
    resources: dict[str, Any] = {"num_cpus": federation.plan.training.threads, "num_gpus": 0.0}
    if federation.device != "cpu":
        resources["num_gpus"] = 1.0 / len(federation.cohorts)
    try:
        run_simulation(
            server_app=make_server_app(guarded),
            client_app=make_client_app(SimulatedSites(federation, patience_s)),
            num_supernodes=len(federation.cohorts),
            backend_config={
                "init_args": {
                    "include_dashboard": False,
                    "_node_ip_address": _LOOPBACK,
                    "log_to_driver": False,
                    "logging_level": logging.ERROR,
                },
                "client_resources": resources,
            },
        )
    finally:
        ray.shutdown()
    if failure:
        raise failure[0]


@contextmanager
def _quiet() -> Any:
    """No telemetry, update checks or news of Flower's, for us and for every process we start."""
    before = {name: os.environ.get(name) for name in _QUIET}
    flower = logging.getLogger("flwr")
    level = flower.level
    os.environ.update(_QUIET)
    flower.setLevel(logging.ERROR)
    try:
        yield
    finally:
        flower.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
