"""One run of the kill ladder: signal everything in a slot, then prove that the slot is empty.

The warden steps it for a server of ours; `reap` does for what a dead owner left behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from orchestrator.base.log import event_log
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import ladder, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.pin import Pin
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot

VERIFY_EVERY_S: Final = 0.02
_REAP_GRACE_S: Final = 0.3
_log = event_log("orchestrator.server")


@dataclass(slots=True, eq=False)
class Eviction:
    """A run in progress; `step` never blocks.

    Attributes:
        poll: Gets the pidfds of what is waited for.
        server: Our own child, until it is reaped.
        group: Process group (and session) of the slot's server, if it cannot be another's.
    """

    slot: Slot
    poll: select.poll
    rungs: deque[ladder.SignalAt]
    server: ServerProcess | None = None
    group: int | None = None
    signalled: set[int] = field(default_factory=set)
    _sent: tuple[int, ...] = ()
    _pins: dict[int, Pin] = field(default_factory=dict)
    _gives_up_at: float = math.inf
    _why: str = ""

    def step(self) -> SlotEvidence | None:
        """Send what is due; return the evidence once the slot is empty, or after giving up."""
        if self._is_empty():
            return SlotEvidence(True)
        now = time.monotonic()
        while self.rungs and self.rungs[0].at_s <= now:
            self._signal_all(self.rungs.popleft().signum)
        return self._give_up() if now >= self._gives_up_at else None

    def timeout_ms(self) -> float:
        """Return how long to wait for `poll` before the next step."""
        next_rung = [rung.at_s - time.monotonic() for rung in tuple(self.rungs)[:1]]
        return max(0.0, min([VERIFY_EVERY_S, *next_rung]) * 1000)

    def close(self) -> None:
        for pin in tuple(self._pins.values()):
            self._unpin(pin)

    def _is_empty(self) -> bool:
        """Whether all known processes are dead, no new one is found, and the lock can be taken."""
        for pin in tuple(self._pins.values()):
            if pin.has_exited:
                self._unpin(pin)
        if self._pins or self._server_runs:
            return False
        late = self._pin(self._inhabitants())
        if not late:
            evidence = self.slot.verify()
            if evidence.is_empty:
                return True
            self._why = evidence.reason
            late = self._pin(self.slot.lock_holders())
        for pin in late:
            self._send(pin)
        return False

    @property
    def _server_runs(self) -> bool:
        return self.server is not None and self.server.exit is None

    def _signal_all(self, signum: int) -> None:
        """Signal our child's process group, then each process that is not in it."""
        is_first = not self._sent
        self._sent = (signum,) if signum == signal.SIGKILL else (signum, signal.SIGCONT)
        if not self.rungs:
            resident = process_table.resident_bytes(self.group) if self.group else 0
            self._gives_up_at = time.monotonic() + ladder.gone_within_s(resident)
        group = self.group if self._server_runs else None
        if group is not None:
            if is_first:  # its descendants can only be found while it is running
                self._pin(self.slot.identified(process_table.descendants({group})))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                for sent in self._sent:
                    os.killpg(group, sent)  # not reaped, so the group is still ours
        if not is_first:
            self._pin(self._inhabitants())
        for pin in self._pins.values():
            if group is None or process_table.group_of(pin.process.pid) != group:
                self._send(pin)  # once each: llama-server ends at once at a second SIGTERM

    def _send(self, pin: Pin) -> None:
        for signum in self._sent:
            pin.signal(signum)
            self.signalled.add(pin.process.pid)

    def _inhabitants(self) -> set[ProcessId]:
        ours = {self.server.pin.process} if self.server is not None else set()
        return self.slot.inhabitants(self.group) - ours

    def _pin(self, processes: Iterable[ProcessId]) -> list[Pin]:
        """Pin the processes that are new to this run, and return the new pins."""
        new = [p for p in processes if p.pid not in self._pins]
        pins = [pin for p in new if (pin := Pin.of(p)) is not None]
        for pin in pins:
            self._pins[pin.process.pid] = pin
            if pin.fd is not None:
                self.poll.register(pin.fd, select.POLLIN)
        return pins

    def _unpin(self, pin: Pin) -> None:
        del self._pins[pin.process.pid]
        if pin.fd is not None:
            self.poll.unregister(pin.fd)
        pin.close()

    def _give_up(self) -> SlotEvidence:
        alive = set(self._pins)
        if self.server is not None and self._server_runs:
            alive.add(self.server.pid)
        pids = sorted(alive)
        _log("error", "process.kill_failed", pids=pids)
        why = f"processes {pids} did not end after SIGKILL" if pids else self._why
        return SlotEvidence(False, why)


def reap(slot: Slot, *, heir_of: ProcessId | None = None) -> tuple[set[int], SlotEvidence]:
    """End what a dead owner left in a slot. The caller owns the slot.

    Args:
        heir_of: Stop as soon as the slot no longer belongs to this dead owner.

    Returns:
        The pids that were signalled, and whether the slot is empty now.
    """
    server = slot.recall()
    is_same = server is not None and process_table.identify(server.pid) == server
    rungs = deque(ladder.kill_plan(_REAP_GRACE_S, now=time.monotonic()))
    group = server.pid if server is not None and is_same else None  # a zombie keeps it too
    run = Eviction(slot, select.poll(), rungs, group=group)
    with contextlib.closing(run):
        while True:
            if heir_of is not None and not slot.belongs_to(heir_of):
                return run.signalled, SlotEvidence(False, "another orchestrator has claimed it")
            if (evidence := run.step()) is not None:
                break
            run.poll.poll(run.timeout_ms())
    if evidence.is_empty:
        slot.forget()
    return run.signalled, evidence
