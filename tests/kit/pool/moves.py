"""What can happen in a world: callers, slots, reports, the clock, and hands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from orchestrator.pool.context import Context
from orchestrator.pool.states import State
from tests.kit.pool.fairness import Cause
from tests.kit.pool.slots import after_grant, dying
from tests.kit.pool.world import (
    EMPTYING,
    Core,
    Gate,
    Key,
    Report,
    Scenario,
    Slot,
    World,
    admitted,
    amounts_key,
    later,
    name_of,
)

Feed = Callable[[World, Key], Iterator[World]]


class Move(NamedTuple):
    """Something that can happen, its cause, and what it leads to."""

    text: str
    cause: Cause
    go: Callable[[], Iterator[World] | list[World]]


class Moves:
    """All moves of a scenario's worlds; `feed` gives the pool a fact."""

    def __init__(self, scenario: Scenario, core: Callable[[Context], Core], feed: Feed) -> None:
        self._scenario = scenario
        self._core = core
        self._feed = feed
        self._asks = scenario.asks or tuple(range(len(scenario.models)))

    def of(self, world: World) -> Iterator[Move]:
        for number, slot in enumerate(world.slots):
            yield from self._of_slot(world, number, slot)
            if slot.reports:
                text = f"the pool hears of {name_of(number)}: {' '.join(slot.reports[0])}"
                yield Move(text, ("report", number), partial(self.hear, world, number))
        yield from self._measures(world)
        stands = self._scenario.is_urgent and any(slot.is_at_work for slot in world.slots)
        if not stands:
            yield Move("a tick", ("tick", -1), partial(self._tick, world))
        for number in self._asks:
            yield from self._of_callers(world, number)
        yield from self._leaving(world)
        yield from self._by_hand(world)

    # --------------------------------------------------------------------------------- callers
    def _of_callers(self, world: World, number: int) -> Iterator[Move]:
        if not world.idle:
            return
        slot, name = world.slots[number], name_of(number)
        entry = world.core.by_model[number]
        one = world._replace(idle=world.idle - 1)
        is_changed = entry is not None and entry.is_changed
        # The owner tries the gate of a Resident only, and not of one that was changed.
        enters = slot.gate == "open" and world.core.state(number) is State.RESIDENT
        enters = enters and not is_changed
        places, is_first = self._scenario.models[number].places, not world.core.requests.get(name)
        has_place = places is None or (slot.inside < places and is_first)
        if slot.gate == "open" and not is_changed and has_place:
            inside = after_grant(self._scenario, slot)
            yield Move(
                f"someone enters {name}", ("ask", number), lambda: [one.with_slot(number, inside)]
            )
        wanted = Key("wanted", number, len(world.core.ctx.waiting), has_entered=enters)
        key = wanted._replace(has_entered=enters and has_place)
        yield Move(f"someone wants {name}", ("ask", number), partial(self._feed, one, key))
        if (left := one.spending("load")) is not None:
            by_hand = wanted._replace(why="load")
            yield Move(f"someone loads {name}", ("ask", number), partial(self._feed, left, by_hand))
        if (left_ := one.spending("force")) is not None:
            anew = wanted._replace(why="load", flag=True, has_entered=False)
            yield Move(
                f"someone loads {name} anew", ("ask", number), partial(self._feed, left_, anew)
            )

    def _leaving(self, world: World) -> Iterator[Move]:
        for number, slot in enumerate(world.slots):
            if slot.inside:
                yield Move(
                    f"someone leaves {name_of(number)}",
                    ("leave" if self._scenario.models[number].places is None else "done", number),
                    partial(self._leave, world, number),
                )
        if not self._scenario.leaves:
            return
        seen: set[str] = set()
        for waiter in world.core.ctx.waiting:
            if waiter.ticket is None:
                continue
            number = "ABCDEFGH".index(waiter.name)
            cause = "withdraw" if waiter.name not in seen else "withdraw2"
            seen.add(waiter.name)
            key = Key("withdrawn", number, int(waiter.ticket))
            one = world._replace(idle=world.idle + 1)
            yield Move(
                f"a waiter of {waiter.name} leaves",
                (cause, number),
                partial(self._feed, one, key),
            )

    def _leave(self, world: World, number: int) -> Iterator[World]:
        """The last one out ends a drain. The pool looks if somebody waits for room or a place."""
        used = 0.0 if self._scenario.uses_age else None
        slot = world.slots[number]._replace(inside=world.slots[number].inside - 1, used=used)
        if slot.phase == "drain" and not slot.inside:
            slot = dying(slot, "stopped")
        after = world.with_slot(number, slot)._replace(idle=world.idle + 1)
        is_empty = not slot.inside and slot.gate == "open" and bool(world.core.ctx.waiting)
        if not is_empty and not admitted(self._scenario, after, number):
            yield after
        else:
            yield from self._feed(after, Key("look"))

    # ----------------------------------------------------------------------------------- hands
    def _by_hand(self, world: World) -> Iterator[Move]:
        for number in range(len(world.slots)):
            yield from self._catalogue(world, number)
            for fault, cut in (("unload", False), ("cut", True)):
                left = world.spending(fault)
                if left is not None:
                    key = Key("unload", number, self._free_ticket(world), cut)
                    yield self._hand(f"{name_of(number)} is unloaded by hand", left, key)
            if (left := world.spending("cancel")) is not None:
                key = Key("cancel", number, self._free_ticket(world))
                yield self._hand(f"{name_of(number)} is cancelled by hand", left, key)
        if (left := world.spending("shutdown")) is not None:
            yield self._hand("shutdown", left, Key("shutdown"))
        if (left := world.spending("budget")) is not None:
            left = left._replace(budget=world.budget + 1)
            yield self._hand("the budget changes", left, Key("configured", number=left.budget))

    def _catalogue(self, world: World, number: int) -> Iterator[Move]:
        name, entry = name_of(number), world.core.by_model[number]
        is_there = entry is not None and not entry.is_removed
        if is_there and (left := world.spending("remove")) is not None:
            key = Key("removed", number, self._free_ticket(world))
            yield self._hand(f"{name} is removed", left, key)
        if not is_there and (left := world.spending("add")) is not None:
            key = Key("defined", number, flag=True, number=0)
            yield self._hand(f"{name} is added again", left, key)
        yield from self._too_late(world, number, is_there=is_there)
        if is_there and entry is not None and (left := world.spending("change")) is not None:
            variant = 1 - entry.definition.size_bytes
            key = Key("defined", number, flag=True, number=variant)
            yield self._hand(f"{name} is changed", left, key)
            key = Key("defined", number, flag=False, number=entry.definition.size_bytes)
            yield self._hand(f"{name} gets another alias", left, key)

    def _too_late(self, world: World, number: int, *, is_there: bool) -> Iterator[Move]:
        """What belongs to the start of a pool comes later, and a removal comes twice."""
        name, is_absent = name_of(number), world.core.state(number) is State.ABSENT
        if (left := world.spending("preload")) is not None:
            yield self._hand(f"{name} is to be preloaded", left, Key("preload", number))
        is_too_late = not is_there or not is_absent or world.core.ctx.is_shutting_down
        if is_too_late and (left := world.spending("adopt")) is not None:
            key = Key("adopted", number, has_entered=True)
            yield self._hand(f"{name} is adopted too late", left, key)
        if not is_there and (left := world.spending("forget")) is not None:
            key = Key("removed", number, self._free_ticket(world))
            yield self._hand(f"{name} is removed again", left, key)

    def _hand(self, text: str, world: World, key: Key) -> Move:
        return Move(text, ("hand", -1), partial(self._feed, world, key))

    @staticmethod
    def _free_ticket(world: World) -> int:
        return EMPTYING + 100 + sum(len(entry.emptying) for entry in world.core.ctx.entries)

    # ----------------------------------------------------------------------------------- slots
    def _of_slot(self, world: World, number: int, slot: Slot) -> Iterator[Move]:
        def posts(text: str, after: Slot, *report: str, fault: str = "") -> Iterator[Move]:
            left = world.spending(fault) if fault else world
            if left is not None:
                if report:
                    after = after._replace(reports=(*slot.reports, Report(*report)))
                gone = slot.inside - after.inside
                left = left.with_slot(number, after)._replace(idle=left.idle + gone)
                cause = ("fault", -1) if fault else ("slot", number)
                yield Move(f"{name_of(number)} {text}", cause, lambda: [left])

        match slot.phase:
            case "spawn":
                sized = slot._replace(phase="sized")
                yield from posts("tells its figure", sized, "sized", amounts_key(slot.figure))
                yield from posts("fails to start", dying(slot, "failed"), fault="fail")
            case "loading":
                gate: Gate = "open" if slot.gate == "new" else "shut"
                up = slot._replace(phase="up", gate=gate)
                yield from posts("is Healthy", up, "healthy", amounts_key(slot.takes))
                yield from posts("runs out of memory", dying(slot, "oom"), fault="oom")
            case "up" | "drain":
                dead = dying(slot, "crashed")
                yield from posts("crashes", dead, "leaving", fault="crash")
                if slot.phase == "drain":
                    yield from posts("has drained for too long", dying(slot, "stopped"))
            case "dying":
                empty = Slot(reports=slot.reports)
                yield from posts("is verified empty", empty, "emptied", slot.why)
                ghost = slot._replace(phase="ghost")
                yield from posts("does not die", ghost, "stuck", fault="stuck")
            case "ghost":
                empty = Slot(reports=(*slot.reports, Report("emptied", "stopped")))
                yield Move(
                    f"{name_of(number)} dies at last",
                    ("mercy", number),
                    lambda: [world.with_slot(number, empty)],
                )

    def hear(self, world: World, number: int) -> Iterator[World]:
        """The pool processes the first report of a slot."""
        slot = world.slots[number]
        report, *others = slot.reports
        before = world.with_slot(number, slot._replace(reports=tuple(others)))
        entered = report.trigger == "healthy" and slot.gate == "open"
        key = Key(report.trigger, number, why=report.why, has_entered=entered)
        for after in self._feed(before, key):
            there = after.slots[number]
            if report.trigger == "sized" and there.phase == "sized":  # it reads its weights now
                there = there._replace(phase="loading", takes=there.fits)
                yield after.with_slot(number, there)
            else:
                yield after

    def _measures(self, world: World) -> Iterator[Move]:
        for number, edition in world.measures:
            rest = tuple(one for one in world.measures if one != (number, edition))
            after = world._replace(measures=rest)
            entry = world.core.by_model[number]
            variant = entry is not None and bool(entry.definition.size_bytes)
            key = Key("measured", number, flag=variant, number=edition)
            yield Move(
                f"{name_of(number)} is measured",
                ("slot", number),
                partial(self._feed, after, key),
            )
            if (left := after.spending("unmeasurable")) is not None:
                failed = Key("measure_failed", number, number=edition)
                yield Move(
                    f"{name_of(number)} cannot be measured",
                    ("fault", -1),
                    partial(self._feed, left, failed),
                )

    # ----------------------------------------------------------------------------------- clock
    def _tick(self, world: World) -> Iterator[World]:
        cap = self._scenario.cap
        slots = tuple(
            slot
            if slot.used is None
            else slot._replace(used=0.0 if slot.inside else max(slot.used - 1.0, -cap))
            for slot in world.slots
        )
        ctx = later(world.core.ctx, cap)
        after = world._replace(core=self._core(ctx), slots=slots)
        if ctx.timer_at is not None and ctx.timer_at <= 0.0:
            yield from self._feed(after, Key("look"))
        else:
            yield after
