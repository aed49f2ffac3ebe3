"""The programs that Layer A explores, with their faults and policies.

`explored` explores each of them once, for the tests of the checker and of the mutants together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from orchestrator.machine.context import Policy
from orchestrator.machine.recovery import RestartPolicy
from tests.kit.machine.checker import Report, explore
from tests.kit.machine.world import NO_FAULTS, Faults

CONTINUE = Policy(abandoned_load="continue")
FULL = Policy(max_waiting=1, max_prefetches=1)
RESTART = Policy(restart=RestartPolicy(limit=1))
IDLE = Policy(idle_ttl_s=1.0)
IDLE_RESTART = Policy(idle_ttl_s=1.0, restart=RestartPolicy(limit=1))
KEEP = Policy(keeps_server=True)
FEW = Policy(max_looking=2)
RESTART_CONTINUE = Policy(abandoned_load="continue", restart=RestartPolicy(limit=2))

PROGRAMS: dict[str, dict[str, Any]] = {
    # supersede, join, queue, reject
    "load A | load B | unload": {},
    "load A | load B queue; cancel | load A queue": {},
    "load A force | load B queue | load A queue": {"warm": "A"},
    "load A | load B reject | unload B": {},
    "load A force | load A": {"warm": "A"},
    "load A force | load B queue | unload A": {"warm": "A"},
    "load A | load B queue | unload B": {},
    # cancel and withdraw
    "load A id=x | cancel x": {},
    "load A id=x | load A id=y | cancel x": {},
    "load A id=x | load B queue id=x | cancel x": {},
    "load A; cancel | load B": {},
    "load A; withdraw | load A; withdraw": {},
    "load A; withdraw | load B": {"policy": CONTINUE},
    "load A; withdraw | load B queue": {},
    "load A; withdraw | load B queue; cancel | unload": {},
    # leases and drains
    "lease; release | load A | load B": {},
    "lease; withdraw | load A | unload": {},
    "lease; withdraw | load B; cancel": {"warm": "A"},
    "lease; release | load B | unload cut": {"warm": "A"},
    "lease; release | unload | unload A cut": {"warm": "A"},
    "lease; release; lease | load B; load C": {"warm": "A"},
    "lease; release | load B | shutdown": {"warm": "A"},
    "lease; release | unload A; load B": {"warm": "A"},
    "lease | load A": {},
    "load A; withdraw | lease late; release": {},
    "load A | unload | lease late": {},
    "lease | load A | load B queue": {"faults": NO_FAULTS},
    "lease | load B | shutdown": {"warm": "A", "faults": NO_FAULTS},
    # between a commit and the promotion of what waits behind it
    "load A | load B queue; cancel": {"faults": NO_FAULTS},
    "load A | load B queue | unload": {"faults": NO_FAULTS},
    # shutdown
    "load A | load B | shutdown": {},
    "load A | load B queue | shutdown": {},
    "load B | shutdown; unload": {"warm": "A"},
    "load A | shutdown; load B | lease": {},
    "unload | shutdown; load B | lease": {"warm": "A"},
    # Hub models: resolved, and with `prefetch` downloaded, while the server runs
    "load o/B | load C": {"warm": "A"},
    "load o/B prefetch | load A | unload": {"warm": "A"},
    "load o/B prefetch id=x | cancel x | load A slow": {"warm": "A"},
    "load A slow | load o/B prefetch": {},
    "load o/B prefetch; cancel | load C queue": {"warm": "A"},
    "load o/B prefetch | load o/B queue; withdraw | unload o/B": {},
    "load o/B prefetch; withdraw | lease; release": {},
    "load o/B | lease; release | shutdown": {"warm": "A"},
    "load o/B prefetch deadline | load C restore": {"warm": "A"},
    "load o/B prefetch queue": {"warm": "A", "policy": RESTART},
    "load o/B prefetch queue | load C": {"warm": "A", "policy": RESTART, "faults": NO_FAULTS},
    "load o/B queue | lease; withdraw": {"warm": "A", "policy": IDLE},
    "prefetch o/B id=x | cancel x | prefetch o/B": {},
    "prefetch o/B; withdraw | load o/B | shutdown": {"warm": "A"},
    "prefetch o/B deadline | load o/B prefetch | unload": {},
    "load o/B prefetch | load A queue | load C queue | prefetch o/C": {
        "policy": FULL,
        "faults": NO_FAULTS,
    },
    "load o/B | prefetch o/C | load o/D prefetch queue": {"policy": FULL, "faults": NO_FAULTS},
    # deadlines
    "load A deadline | load B queue deadline": {},
    "load B deadline | lease; release": {"warm": "A"},
    # calls that arrive in another order than they were made
    "load A late | load B late | unload": {},
    "load A late | load B | unload A": {"warm": "A"},
    "load A late | unload; load A": {},
    "load A late | load A | load B queue": {},
    # look-ups that take a while
    "load A slow | load B slow | unload": {},
    "load B slow | load A; unload A": {"warm": "A"},
    "load A slow | load B | unload A": {"warm": "A"},
    "load A slow | load A": {},
    "load A slow queue | load B slow reject": {"warm": "A"},
    "load A slow id=x; withdraw | cancel x | load A slow id=x": {},
    "load A slow; withdraw | load B slow deadline": {"policy": CONTINUE},
    "load A slow deadline | shutdown | prefetch o/B slow": {"warm": "A"},
    "prefetch o/B slow; withdraw | prefetch o/B slow id=x | cancel x": {},
    "prefetch o/B slow; withdraw | unload": {"policy": CONTINUE},
    "load A slow | load B slow | load C": {"policy": FEW},
    "load A | prefetch A": {},
    # a slot that fills again
    "load A | unload": {"faults": Faults(strays=4)},
    # the keeper is killed at any moment
    "load A | load B queue | unload A": {"faults": Faults(keeper=2, kill=False)},
    "load A force; cancel | load B": {"warm": "A", "faults": Faults(keeper=2, kill=False)},
    "load B restore | unload": {
        "warm": "A",
        "policy": RESTART,
        "faults": Faults(keeper=1, kill=False),
    },
    # a server hangs at any moment
    "load A | load B queue; cancel ": {"faults": Faults(hang=1, kill=False)},
    "lease; release | load B restore": {
        "warm": "A",
        "policy": RESTART,
        "faults": Faults(hang=1, kill=False),
    },
    "unload | shutdown | lease": {
        "warm": "A",
        "policy": RESTART,
        "faults": Faults(hang=1, kill=False),
    },
    # a server prints what it takes of memory
    "load A | load B; cancel": {"faults": Faults(figures=True, kill=False)},
    "load B restore; withdraw": {
        "warm": "A",
        "policy": RESTART,
        "faults": Faults(figures=True, host=1, kill=False),
    },
    # the host is killed at any moment, and the next owner finds what it has left
    "load A | unload ": {"faults": Faults(host=1, kill=False)},
    "load A | unload  ": {"policy": KEEP, "faults": Faults(host=1)},
    "load A id=x | load B queue | cancel x": {
        "warm": "A",
        "policy": KEEP,
        "faults": Faults(host=1, kill=False),
    },
    "load A; cancel | load B ": {
        "warm": "A",
        "policy": KEEP,
        "faults": Faults(host=1, keeper=1, kill=False, crash=False),
    },
    "load A; withdraw | lease; release": {
        "warm": "A",
        "policy": KEEP,
        "faults": Faults(host=1, hang=1, kill=False),
    },
    "load A | shutdown": {"warm": "A", "policy": KEEP, "faults": Faults(host=2)},
    "lease | shutdown; unload": {"warm": "A", "policy": KEEP},
    # the previous model is restored
    "load B restore": {"warm": "A"},
    "load B restore | load C": {"warm": "A"},
    "load B restore | load A": {"warm": "A"},
    "load B restore id=x | cancel x | unload": {"warm": "A"},
    "load B restore; cancel | load C restore queue": {"warm": "A"},
    "load B restore; withdraw | lease; release": {"warm": "A"},
    "load B restore deadline | unload A": {"warm": "A"},
    "load A deadline; load B restore deadline": {},
    "load B restore | shutdown": {"warm": "A"},
    "load B restore | load C reject": {"warm": "A", "policy": CONTINUE},
    "load B restore | load C queue deadline": {"warm": "A"},
    # a server that ended by itself is restarted
    "load A": {"policy": RESTART_CONTINUE},
    "load A deadline": {"policy": RESTART_CONTINUE},
    "load A deadline; load B restore deadline ": {"policy": RESTART},
    "unload | load A": {"warm": "A", "policy": RESTART},
    "unload A | lease; withdraw": {"warm": "A", "policy": RESTART},
    "lease; release | lease": {"warm": "A", "policy": RESTART},
    "load B restore | load A force": {"warm": "A", "policy": RESTART},
    "load A; withdraw | load A; withdraw ": {"policy": RESTART},
    "load A id=x | cancel x | load B queue": {"warm": "A", "policy": RESTART},
    "shutdown | lease": {"warm": "A", "policy": RESTART},
    # an idle server
    "load A | load A": {"policy": IDLE},
    "lease; release | load A; load B": {"warm": "A", "policy": IDLE},
    "lease; withdraw | load B queue": {"warm": "A", "policy": IDLE},
    "load A pinned | load A | unload": {"policy": IDLE},
    "load A queue | load B force; cancel": {"warm": "A", "policy": IDLE},
    "lease | load A force": {"warm": "A", "policy": IDLE_RESTART},
    "load B restore | shutdown ": {"warm": "A", "policy": IDLE},
}

DEEP: dict[str, dict[str, Any]] = {
    # four clients
    "load A | load B | load C | unload": {},
    "load A | load B queue | load C queue | load A queue": {},
    "load A id=x | load B id=x queue | cancel x | unload B": {},
    "load A | load B queue | load C queue | unload B": {},
    "load B restore | load C queue | unload A | unload C": {"warm": "A"},
    "load B deadline | unload B | load C queue": {"warm": "A", "policy": RESTART},
    "load A; withdraw | load A; withdraw | load B; withdraw | lease; release": {
        "faults": Faults(health=False)
    },
    "lease; release | load A; withdraw | load B queue | shutdown": {},
    "lease; release | lease; withdraw | load B | load A queue": {"warm": "A"},
    "load A slow | load B slow | load A | unload A": {},
    "load A deadline | load B queue deadline | lease; release | unload": {},
    "load B restore | load C restore queue | load A | unload B": {"warm": "A"},
    "load B restore deadline | lease; release | load A queue | shutdown": {"warm": "A"},
    "load A | load B queue | lease; release | unload": {"warm": "A", "policy": RESTART},
    "lease; release | load A | load B queue | unload": {"warm": "A", "policy": IDLE_RESTART},
    "load A | load B; cancel | lease; withdraw | load A queue": {"policy": CONTINUE},
    "load o/B prefetch | load C queue; cancel | lease; release | unload": {"warm": "A"},
    "load o/B prefetch restore | load o/C prefetch queue | load A slow": {"warm": "A"},
    "prefetch o/B id=x | load o/B id=x prefetch | cancel x | shutdown": {},
    # longer programs without faults
    "load A force | load B queue; cancel | load A queue | load A force": {
        "warm": "A",
        "faults": NO_FAULTS,
    },
    "lease; release | load A; load B | load C queue; cancel | unload; load A": {
        "warm": "A",
        "faults": NO_FAULTS,
    },
}
"""For nightly runs: hundreds of thousands of worlds each."""


@cache
def explored(program: str) -> Report:
    return explore(program, **PROGRAMS[program])


FIRST = (
    "load A id=x | cancel x",
    "prefetch o/B slow; withdraw | unload",
    "load o/B prefetch queue | load C",
    "lease | load B | shutdown",
    "unload A | lease; withdraw",
    "prefetch o/B id=x | cancel x | prefetch o/B",
    "load o/B prefetch; withdraw | lease; release",
    "load A | unload  ",
    "load A | load A",
    "load o/B | prefetch o/C | load o/D prefetch queue",
    "load A | prefetch A",
    "load A | unload",
    "lease | shutdown; unload",
    "load A deadline",
    "load A; withdraw | lease late; release",
    "load B restore",
    "load A late | unload; load A",
    "load A | load B queue; cancel ",
    "load A slow | load o/B prefetch",
    "load o/B prefetch queue",
    "load A | load B reject | unload B",
    "unload | load A",
    "prefetch o/B deadline | load o/B prefetch | unload",
    "load A | load B queue | unload B",
    "load A slow; withdraw | load B slow deadline",
    "load A late | load A | load B queue",
    "load A slow | load B slow | load C",
    "load A | load B queue; cancel | load A queue",
    "load A | load B; cancel",
)
"""Programs in which every row of the table fires, as long as nobody changes it; they take 25 s."""
