"""The NVFlare client of federation_cost.py: receives a model, trains a round, sends it back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nvflare.client as flare
from cost_arms import site_trainer

if __name__ == "__main__":
    work, notes = (Path(argument) for argument in sys.argv[1:])
    flare.init()
    site = flare.get_site_name()
    while flare.is_running():
        received = flare.receive()
        round_ = received.current_round + 1
        import torch

        weights = {name: torch.as_tensor(value) for name, value in received.params.items()}
        trained, outcome, patients = site_trainer(work, site)(weights, round_)
        with (notes / site).open("a") as stream:
            said = {"site": site, "round": round_, "steps": outcome.steps, "loss": outcome.loss}
            stream.write(json.dumps(said) + "\n")
        flare.send(
            flare.FLModel(
                params=trained,
                params_type=flare.ParamsType.FULL,
                meta={"NUM_STEPS_CURRENT_ROUND": patients},
            )
        )
