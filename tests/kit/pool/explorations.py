"""The scenarios that are explored: normally, and by night."""

from __future__ import annotations

from functools import cache
from typing import Final

from tests.kit.pool.checker import Report, explore
from tests.kit.pool.world import Model, Scenario, ticks

ONE: Final = Model()
TWO: Final = Model(size=(2,), changed=(2,))
PINNED: Final = Model(is_pinned=True)
ALL_ONE: Final = (ONE, ONE, ONE)
BIG_AND_SMALL: Final = (TWO, ONE, ONE)
ROOM_FOR_TWO: Final = ((2,),)

SCENARIOS: Final[dict[str, Scenario]] = {
    # ---- nothing goes wrong but the order; endless requests -------------------------------------
    "one fits": Scenario(ALL_ONE),
    "two fit": Scenario(ALL_ONE, ROOM_FOR_TWO, clients=2, is_slow=False),
    "big and small": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO, is_slow=False),
    "big among three small": Scenario(
        (*BIG_AND_SMALL, ONE), ROOM_FOR_TWO, leaves=False, is_slow=False
    ),
    "two big, two small": Scenario(
        (TWO, TWO, ONE, ONE), ROOM_FOR_TWO, clients=2, leaves=False, is_slow=False
    ),
    "places": Scenario((Model(places=1), Model(places=1)), faults={"crash": 1}),
    "places by hand": Scenario(
        (Model(places=1), ONE),
        clients=2,
        faults={"cancel": 1, "unload": 1, "force": 1, "load": 1},
        is_slow=False,
    ),
    "a queue at a server": Scenario((Model(places=1), ONE), clients=4, leaves=False, is_slow=False),
    "places, held": Scenario(
        (Model(places=1), ONE), policy=ticks(max_wait=2, held=3), clients=2, is_slow=False
    ),
    # ---- other times ----------------------------------------------------------------------------
    "max_wait 2": Scenario(ALL_ONE, policy=ticks(max_wait=2), is_slow=False),
    "max_wait 0": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO, ticks(max_wait=0), clients=2),
    "min_resident 2": Scenario(ALL_ONE, policy=ticks(min_resident=2), clients=2),
    "min_resident 0": Scenario((TWO, ONE), ROOM_FOR_TWO, ticks(min_resident=0)),
    "held": Scenario((ONE, ONE), policy=ticks(max_wait=2, held=3), clients=2, faults={"load": 1}),
    "idle": Scenario((Model(ttl=2), ONE), ROOM_FOR_TWO, clients=2),
    "weights": Scenario(
        (Model(weight=2), ONE, ONE), policy=ticks(max_wait=3), clients=2, is_slow=False
    ),
    "bounded wait": Scenario(
        ALL_ONE, ROOM_FOR_TWO, ticks(max_wait=2, min_resident=1), clients=2, is_urgent=True, bound=2
    ),
    "bounded wait, long stay": Scenario(
        (ONE, ONE), policy=ticks(max_wait=1, min_resident=3), is_urgent=True, bound=3
    ),
    "weights, bounded": Scenario(
        (Model(weight=9), ONE, ONE),
        policy=ticks(max_wait=1, min_resident=1),
        is_urgent=True,
        is_slow=False,
        leaves=False,
        bound=2,
    ),
    # ---- pins, groups, devices, limits ----------------------------------------------------------
    "pinned": Scenario((PINNED, ONE, ONE), ROOM_FOR_TWO, clients=2, is_slow=False),
    "too large beside a pinned one": Scenario((PINNED, TWO), ROOM_FOR_TWO, clients=2),
    "a group": Scenario(
        (Model(group="g"), Model(group="g"), ONE), ROOM_FOR_TWO, clients=2, is_slow=False
    ),
    "a group with a pinned one": Scenario(
        (Model(group="g", is_pinned=True), Model(group="g")), ROOM_FOR_TWO, clients=2
    ),
    "two devices": Scenario(
        (Model((1, 0)), Model((0, 1)), Model((1, 1))), ((1, 1),), clients=2, is_slow=False
    ),
    "max_resident": Scenario(ALL_ONE, ((3,),), ticks(max_resident=1), clients=2),
    "max_waiting": Scenario(ALL_ONE, policy=ticks(max_waiting=1), faults={"load": 1}),
    # ---- figures that turn out wrong ------------------------------------------------------------
    "estimate too low": Scenario((Model(exact=(2,)), ONE), ROOM_FOR_TWO, clients=2),
    "estimate too high": Scenario((Model((2,), exact=(1,)), ONE), ROOM_FOR_TWO, clients=2),
    "exact is too large": Scenario((Model(exact=(3,)), ONE), ROOM_FOR_TWO, clients=2),
    "too low beside a pinned one": Scenario((Model(exact=(2,)), PINNED), ROOM_FOR_TWO, clients=2),
    "declared": Scenario((Model(exact=(2,), is_declared=True), ONE), ROOM_FOR_TWO, clients=2),
    "fitted": Scenario((Model((3,), is_fitted=True), ONE, PINNED), ROOM_FOR_TWO, clients=2),
    "fitted to less": Scenario(
        (Model((3,), is_fitted=True, fits_to=(1,)), ONE), ROOM_FOR_TWO, clients=2
    ),
    "a fitting that fails": Scenario(
        (Model((3,), is_fitted=True, fits_to=(3,)), ONE), ROOM_FOR_TWO, clients=1
    ),
    "measured": Scenario(
        (Model(is_measured=False), ONE),
        clients=2,
        faults={"unmeasurable": 1, "change": 1},
        is_slow=False,
    ),
    # ---- what fails -----------------------------------------------------------------------------
    "failed starts": Scenario((TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"fail": 2}),
    "out of memory": Scenario(
        (ONE, ONE), ROOM_FOR_TWO, clients=2, faults={"oom": 2}, is_slow=False
    ),
    "out of memory, three": Scenario(
        ALL_ONE, ROOM_FOR_TWO, clients=2, faults={"oom": 1}, is_slow=False
    ),
    "crashes": Scenario((TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"crash": 2}),
    "crash of a pinned one": Scenario(
        (PINNED, ONE), clients=2, faults={"crash": 1, "fail": 1, "unload": 1}, is_slow=False
    ),
    "restarts": Scenario(
        (Model(restarts=True), ONE),
        policy=ticks(restart_limit=2),
        clients=1,
        faults={"crash": 2, "fail": 2},
        is_slow=False,
    ),
    "does not die": Scenario((TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"stuck": 1}),
    "does not die, three": Scenario(
        ALL_ONE, ROOM_FOR_TWO, clients=2, faults={"stuck": 1}, is_slow=False
    ),
    # ---- by hand --------------------------------------------------------------------------------
    "loads by hand": Scenario((ONE, ONE), clients=2, faults={"load": 1, "fail": 1}),
    "loads anew": Scenario((ONE, ONE), clients=2, faults={"force": 1, "fail": 1}),
    "unloads by hand": Scenario((TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"unload": 2}),
    "cancels by hand": Scenario(
        (TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"cancel": 2, "stuck": 1}
    ),
    "cancel, remove": Scenario(
        (ONE, ONE), clients=2, faults={"cancel": 1, "remove": 1}, is_slow=False
    ),
    "unload, cut, load": Scenario(
        (ONE, ONE), clients=2, faults={"unload": 1, "cut": 1, "load": 1}, is_slow=False
    ),
    "removed and added": Scenario(
        (TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"remove": 1, "add": 1, "unload": 1}
    ),
    "changed": Scenario((Model(changed=(2,)), ONE), ROOM_FOR_TWO, clients=2, faults={"change": 1}),
    "hands and a stuck one": Scenario(
        (ONE, ONE),
        clients=2,
        faults={"unload": 1, "stuck": 1, "remove": 1, "add": 1},
        is_slow=False,
    ),
    "a smaller budget": Scenario(
        (ONE, TWO, PINNED), ((3,), (1,), (3,)), clients=2, faults={"budget": 2}, is_slow=False
    ),
    "shutdown": Scenario(
        (TWO, ONE), ROOM_FOR_TWO, clients=2, faults={"shutdown": 1, "stuck": 1, "crash": 1}
    ),
    "too late": Scenario(
        (ONE, ONE),
        clients=1,
        faults={"remove": 1, "shutdown": 1, "preload": 1, "adopt": 1, "forget": 1},
        is_slow=False,
    ),
    # ---- the start of a pool, late reports ------------------------------------------------------
    "preloads": Scenario(
        ALL_ONE,
        ROOM_FOR_TWO,
        clients=1,
        preload=(1, 0, 2),
        is_slow=False,
        faults={"fail": 1},
    ),
    "preload, out of memory": Scenario(
        (ONE, ONE), ROOM_FOR_TWO, clients=1, preload=(1,), faults={"oom": 1}, adopted=(0,)
    ),
    "adopted": Scenario((TWO, ONE), ROOM_FOR_TWO, clients=2, adopted=(0, 1)),
    "late reports": Scenario(
        (ONE, ONE), clients=1, has_late=True, faults={"fail": 1, "stuck": 1, "crash": 1}
    ),
}

DEEP: Final[dict[str, Scenario]] = {
    "big among three small, with room left": Scenario(
        (*BIG_AND_SMALL, ONE), ((3,),), leaves=False, is_slow=False
    ),
    "two fit, slow": Scenario(ALL_ONE, ROOM_FOR_TWO),
    "big and small, slow": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO),
    "two big, two small, three clients": Scenario(
        (TWO, TWO, ONE, ONE), ROOM_FOR_TWO, leaves=False, is_slow=False
    ),
    "bounded wait, three clients": Scenario(
        ALL_ONE, ROOM_FOR_TWO, ticks(max_wait=2, min_resident=1), is_urgent=True, bound=4
    ),
    "a group, slow": Scenario(
        (Model(group="g"), Model(group="g"), ONE), ROOM_FOR_TWO, clients=2, faults={"crash": 1}
    ),
    "pinned, slow": Scenario((PINNED, ONE, ONE), ROOM_FOR_TWO),
    "both too low, slow": Scenario((Model(exact=(2,)), Model(exact=(2,)), ONE), ((3,),), clients=2),
    "failed starts, slow": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO, clients=2, faults={"fail": 2}),
    "out of memory, slow": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO, clients=2, faults={"oom": 2}),
    "big among three small, out of memory": Scenario(
        (*BIG_AND_SMALL, ONE), ((3,),), leaves=False, is_slow=False, faults={"oom": 1}
    ),
    "crashes, slow": Scenario(BIG_AND_SMALL, ROOM_FOR_TWO, clients=2, faults={"crash": 2}),
    "restarts, slow": Scenario(
        (Model(restarts=True), ONE), clients=2, faults={"crash": 2, "fail": 2}
    ),
    "all faults": Scenario(
        ALL_ONE, clients=2, faults={"fail": 1, "oom": 1, "crash": 1, "stuck": 1}, is_slow=False
    ),
    "hands, slow": Scenario(
        (ONE, ONE), clients=2, faults={"unload": 1, "cut": 1, "load": 1, "force": 1}
    ),
    "catalogue, slow": Scenario(
        (Model(changed=(2,)), ONE),
        ROOM_FOR_TWO,
        clients=2,
        faults={"change": 1, "remove": 1, "add": 1},
    ),
}


@cache
def explored(name: str) -> Report:
    """Return the exploration of a scenario with the shipped table."""
    return explore(SCENARIOS[name], name=name)
