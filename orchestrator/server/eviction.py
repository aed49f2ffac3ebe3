"""The slow look-up: end what a slot holds where no keeper can be asked.

That is what a dead owner left together with its keeper, what the parent-death signal of a killed
keeper did not reach, and, where processes can leave a keeper (macOS), every end of a server. What
is ours is found by the record, the lock and a token, in the whole process table.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from orchestrator.base.log import event_log
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import ladder, process_table
from orchestrator.server.pin import Pin, wait_exited
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot

_VERIFY_EVERY_S: Final = 0.02
_log = event_log("orchestrator.server")


def look_up(slot: Slot) -> set[ProcessId]:
    """Return the processes of a slot that a dead owner has left."""
    return slot.inhabitants(_group(slot), slot.recall_keeper())


def reap(slot: Slot, ours: ProcessId | None = None) -> tuple[set[int], SlotEvidence]:
    """End what a dead owner left in a slot, and its keeper last. The caller owns the slot.

    Args:
        ours: Our own keeper, which stays.

    Returns:
        The pids that were signalled, and whether the slot is empty now.
    """
    keeper = slot.recall_keeper()
    keeper = None if keeper == ours else keeper
    ended, evidence = evict(slot, ladder.LEFT_GRACE_S, keeper)
    if keeper is not None and (pin := Pin.of(keeper)) is not None:
        pin.signal(ladder.KILL)  # it may be stopped, and has nothing to do any more
        pin.close()
    if evidence.is_empty:
        slot.forget()
    return ended, evidence


def evict(
    slot: Slot, grace_s: float, keeper: ProcessId | None = None
) -> tuple[set[int], SlotEvidence]:
    """Run the kill ladder on all that is found in a slot, until it is verified empty.

    Args:
        grace_s: Seconds between SIGTERM and SIGKILL.
        keeper: The keeper of a dead owner, whose children are the slot's too.

    Returns:
        The pids that were signalled, and whether the slot is empty now.
    """
    rungs = deque(ladder.kill_plan(grace_s, now=time.monotonic()))
    run = _Eviction(slot, _group(slot), keeper, rungs)
    with contextlib.closing(run):
        return run.signalled, run.until_empty()


def _group(slot: Slot) -> int | None:
    """Return the process group of the recorded server, which a zombie keeps too."""
    server = slot.recall()
    is_same = server is not None and process_table.identify(server.pid) == server
    return server.pid if server is not None and is_same else None


@dataclass(slots=True, eq=False)
class _Eviction:
    slot: Slot
    group: int | None
    keeper: ProcessId | None
    rungs: deque[ladder.SignalAt]
    signalled: set[int] = field(default_factory=set)
    _sent: tuple[int, ...] = ()
    _pins: dict[int, Pin] = field(default_factory=dict)
    _gives_up_at: float = math.inf
    _why: str = ""

    def until_empty(self) -> SlotEvidence:
        """Signal what is found; return the evidence once the slot is empty, or after giving up."""
        while not self._is_empty():
            if time.monotonic() >= self._gives_up_at:
                return self._give_up()
            while self.rungs and self.rungs[0].at_s <= time.monotonic():
                self._signal_all(self.rungs.popleft().signum)
            next_rung = [rung.at_s - time.monotonic() for rung in tuple(self.rungs)[:1]]
            wait_s = max(0.0, min([_VERIFY_EVERY_S, *next_rung]))
            if not self._pins:
                time.sleep(wait_s)
            wait_exited(self._pins.values(), wait_s)
        return SlotEvidence(True)

    def close(self) -> None:
        for pin in self._pins.values():
            pin.close()

    def _is_empty(self) -> bool:
        """Whether all known processes are dead, no new one is found, and the lock can be taken."""
        for pin in tuple(self._pins.values()):
            if pin.has_exited:
                self._pins.pop(pin.process.pid).close()
        if self._pins:
            return False
        late = self._pin(self.slot.inhabitants(self.group, self.keeper))
        if not late:
            evidence = self.slot.verify()
            if evidence.is_empty:
                return True
            self._why = evidence.reason
            late = self._pin(self.slot.lock_holders())
        for pin in late:
            self._send(pin)
        return False

    def _signal_all(self, signum: int) -> None:
        self._sent = (signum,) if signum == ladder.KILL else (signum, ladder.CONTINUE)
        if not self.rungs:
            size = max((process_table.resident_bytes(pid) for pid in self._pins), default=0)
            self._gives_up_at = time.monotonic() + ladder.gone_within_s(size)
        self._pin(self.slot.inhabitants(self.group, self.keeper))
        for pin in self._pins.values():  # once each: llama-server ends at once at a second SIGTERM
            self._send(pin)

    def _send(self, pin: Pin) -> None:
        for signum in self._sent:
            pin.signal(signum)
            self.signalled.add(pin.process.pid)

    def _pin(self, processes: set[ProcessId]) -> list[Pin]:
        """Pin the processes that are new, and return the new pins."""
        new = [p for p in processes if p.pid not in self._pins]
        pins = [pin for p in new if (pin := Pin.of(p)) is not None]
        self._pins |= {pin.process.pid: pin for pin in pins}
        return pins

    def _give_up(self) -> SlotEvidence:
        pids = sorted(self._pins)
        _log("error", "process.kill_failed", pids=pids)
        why = f"processes {pids} did not end after SIGKILL" if pids else self._why
        return SlotEvidence(False, why)
