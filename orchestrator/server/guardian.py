"""A small process that outlives a killed host just long enough to end its server.

One per orchestrator. It waits on a pidfd of the host (so forks of the host mean nothing, and no
thread's death is mistaken for the host's), then ends whatever the slot holds by the same rules as
a later start would. It holds no lock while the host lives and never touches another slot.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestrator.base import launch
from orchestrator.server import process_table
from orchestrator.server.process_table import Pin, ProcessId
from orchestrator.server.slot import TOKEN_NAME, Slot

_POLL_HOST_S = 3600.0


def start(slot: Slot) -> subprocess.Popen[bytes]:
    """Start the guardian of this process for a claimed slot; takes about 1 ms here."""
    host = process_table.identify(os.getpid())
    if host is None:
        raise OSError("this process cannot be found in the process table")
    python = launch.interpreter()
    if python is None:
        raise OSError("there is no Python interpreter to run it with")
    importable = [entry for entry in sys.path if isinstance(entry, str)]
    arguments = {
        "path": [str(Path(__file__).parents[2]), *importable],
        "slot": slot.name,
        "state_dir": str(slot.directory.parent),
        "token": slot.token,
        "host": [host.pid, host.start_ticks, host.boot_id],
    }
    code = (
        "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; "
        "from orchestrator.server.guardian import main; main(a)"
    )
    environment = {k: v for k, v in os.environ.items() if k != TOKEN_NAME}
    return launch.popen(
        (python, "-I", "-S", "-c", code, json.dumps(arguments)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def stop(guardian: subprocess.Popen[bytes]) -> None:
    """End a guardian that is not needed any more; the slot must be empty."""
    guardian.kill()  # it may have been stopped
    guardian.wait()


def main(arguments: dict[str, Any]) -> None:
    """Wait for the host to die, then empty its slot."""
    host = ProcessId(*arguments["host"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    while (pin := Pin.to_watch(host)) is not None:
        process_table.wait_exited([pin], _POLL_HOST_S)
        pin.close()
    slot = Slot(arguments["slot"], arguments["state_dir"])
    slot.token = arguments["token"]  # the folder may have been lost and made anew
    if slot.succeed(host):  # else a new orchestrator has claimed it, and reaps by itself
        slot.reap(heir_of=host)
