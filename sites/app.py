"""The site's Flower ClientApp: it forwards opaque bytes to the trainer and knows nothing of them.

The trainer decides, trains and answers. In simulation `connect` gives the trainer's own `handle`;
at a hospital the top-level `app` finds the trainer's socket in the node's configuration. Neither
torch nor anything that reads images is imported here. What goes wrong stays here too: Flower would
send an exception's text, with paths and worse, to the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedseg.carriage import ACTION, BUSY, unwrap, wrap
from sites.client import PATIENCE_S, BusyError, Door, ask

logger = logging.getLogger(__name__)

Handle = Callable[[bytes], bytes]
Connect = Callable[[Context], Handle]
CRASHED = 2


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp that forwards every task to the trainer that `connect` finds for its node."""
    app = ClientApp()

    @app.query(ACTION)
    def forward(message: Message, context: Context) -> Message:
        try:
            answer = connect(context)(unwrap(message))
        except BusyError:
            return Message(Error(code=CRASHED, reason=BUSY), reply_to=message)
        except Exception:
            logger.exception("the trainer cannot be reached or has crashed")
            return Message(Error(code=CRASHED, reason="failed"), reply_to=message)
        return Message(wrap(answer), reply_to=message)

    return app


def connect_trainer(context: Context) -> Handle:
    """The trainer whose socket the relay's node configuration names; see `sites.relay`."""
    told = context.node_config
    token = told.get("token-file")
    door = Door(str(told["trainer"]), Path(str(token)) if token else None)
    study, patience_s = str(told["study"]), float(told.get("patience-s", PATIENCE_S))
    return lambda task: ask(door, study, task, patience_s=patience_s)


app = make_app(connect_trainer)
