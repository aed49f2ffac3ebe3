"""The guardian: a small process that outlives a killed host just long enough to end its server.

There is one per orchestrator. It waits on a pidfd of the host, so neither forks of the host nor the
end of one of its threads are mistaken for the end of the host. Then it empties the slot by the code
a later start would use. It holds no lock while the host lives, and never touches another slot.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from orchestrator.base import launch
from orchestrator.server import eviction, process_table
from orchestrator.server.pin import Pin, wait_exited
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import TOKEN_NAME, Slot

_POLL_HOST_S = 3600.0
_CODE = (
    "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; "
    "from orchestrator.server.guardian import main; main(a)"
)


def start(slot: Slot) -> subprocess.Popen[bytes]:
    """Start the guardian of this process for a claimed slot, in about 1 ms.

    Raises:
        OSError: It cannot be started.
    """
    host = process_table.identify(os.getpid())
    if host is None:
        raise OSError("this process cannot be found in the process table")
    python = launch.interpreter()
    if python is None:
        raise OSError("there is no Python interpreter to run it with")
    arguments = {
        "path": [str(Path(__file__).parents[2]), *launch.import_path()],
        "slot": slot.name,
        "state_dir": str(slot.directory.parent),
        "token": slot.token,
        "host": [host.pid, host.start_ticks, host.boot_id],
    }
    return launch.popen(
        (launch.interpreter(), "-I", "-S", "-c", _CODE, json.dumps(arguments)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k != TOKEN_NAME},
        start_new_session=True,
    )


def stop(guardian: subprocess.Popen[bytes]) -> None:
    """End a guardian; the slot must be empty."""
    guardian.kill()  # it may be stopped, and would not handle SIGTERM
    guardian.wait()


def main(arguments: dict[str, Any]) -> None:
    """Wait until the host has exited, then empty its slot."""
    host = ProcessId(*arguments["host"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    while (pin := Pin.to_watch(host)) is not None:
        wait_exited([pin], _POLL_HOST_S)
        pin.close()
    slot = Slot(arguments["slot"], arguments["state_dir"])
    slot.token = arguments["token"]  # another one if the folder was removed and created again
    if slot.succeed(host):  # else a new orchestrator has claimed it, and reaps
        eviction.reap(slot, heir_of=host)
