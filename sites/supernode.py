"""Flower's SuperNode, in a process that ends when the SuperNode does.

Left to itself, flower-supernode can outlive its end: when a connection was cut in the middle of a
TLS handshake it gives up, says that it terminated, and then waits for a thread for ever, with
nothing that would start it again. Here the process is gone with its main function.

    python -m sites.supernode ARGUMENTS...        as flower-supernode takes them
"""

from __future__ import annotations

import logging
import os
import sys


def main() -> None:
    """Run flower-supernode; the process ends with its status, whatever threads are left."""
    from flwr.supernode.cli import flower_supernode

    sys.argv[0] = "flower-supernode"
    status = 1
    try:
        flower_supernode()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        logging.getLogger(__name__).exception("the SuperNode failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
