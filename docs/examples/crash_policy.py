"""A server that ends by itself is started again, with the same settings.

python crash_policy.py model.gguf

The crash is made here, by a signal, as the kernel does when memory runs out.
"""

import os
import signal
import sys

from orchestrator import Orchestrator, RestartPolicy, State

policy = RestartPolicy(backoff_s=0.5, limit=3, cool_down_s=60)

with Orchestrator(restart=policy) as orch:
    first = orch.load(sys.argv[1])
    events = orch.events()
    os.kill(first.pid, signal.SIGKILL)

    for event in events:  # Killing, Downloading, Spawning, ... as for any load
        print(f"{event.source} -> {event.dest}")
        if event.dest == State.HEALTHY:
            break

    exit_ = orch.status().last_exit
    print(f"the last server ended with {exit_.returncode if exit_ else None}")
    with orch.lease() as server:
        print(f"generation {first.generation} was pid {first.pid}")
        print(f"generation {server.generation} is pid {server.pid}")
