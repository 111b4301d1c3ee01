"""What goes wrong at a site stays there, even when there is no trainer to say so."""

from __future__ import annotations

import logging

import pytest
from flwr.app import Context, Message, RecordDict

from fedseg.carriage import MESSAGE_TYPE, wrap
from fedseg.simulation.inprocess import InProcessGrid
from sites.app import make_app

SECRET = "/data/hospital/patients/DOE^JOHN.nii.gz"


def _no_trainer(_context: Context) -> None:
    raise OSError(SECRET)


@pytest.mark.parametrize("content", [wrap(b"task"), RecordDict()])
def test_no_path_leaves_when_the_trainer_cannot_be_made(
    content: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    grid = InProcessGrid(make_app(_no_trainer), {7: context}, patience_s=60)
    task = Message(content, dst_node_id=7, message_type=MESSAGE_TYPE)
    with caplog.at_level(logging.CRITICAL):
        (reply,) = grid.send_and_receive([task], timeout=10)
    assert reply.has_error()
    assert SECRET not in f"{reply.error.code} {reply.error.reason}"
