"""Signs of work of a server: what tells a slow one from one that hangs.

Work is output, bytes read from storage (page-ins too), or more than 20 % of a core over the last
second, of the server or anything it started. So is reading from a cache, or growing, where that is
more than our own probes can have caused; their cost is no work. Where the kernel hides or lacks a
counter, the others decide.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from orchestrator.server import process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.process_table import Usage

_WINDOW_S: Final = 1.0
_SAMPLE_S: Final = 0.25
_LONGEST_GAP_S: Final = 5.0  # a probe takes at most 4 s
_CPU_SHARE: Final = 0.2  # of one core
_NOISE_BYTES: Final = 64 << 10  # per second
_PROBE_CPU_S: Final = 0.25  # a busy server is slow to answer: that is no cost of the probe


@dataclass(slots=True)
class WorkMeter:
    """The work of one server and of everything it started; ask about once a second.

    Attributes:
        bytes_loaded: The most that one process has read or mapped; never decreases.
    """

    server: ServerProcess
    bytes_loaded: int = 0
    clock: Callable[[], float] = time.monotonic
    _idle_s: float = 0.0
    _sampled_at: float = -math.inf
    _known: dict[int, Usage] = field(default_factory=dict)
    _heard: int = 0  # bytes of output
    _cpu_s: float = 0.0  # of all processes since the first sample, as is the next
    _moved_bytes: int = 0
    _window: deque[tuple[float, float, int]] = field(default_factory=deque)

    def idle_s(self) -> float:
        """Return the seconds without work; time in which nobody asked, as when the machine is
        paused, counts little.
        """
        now = self.clock()
        gap_s = min(now - self._sampled_at, _LONGEST_GAP_S)
        if gap_s < _SAMPLE_S:
            return self._idle_s + gap_s
        is_first = not self._window
        self._idle_s = 0.0 if self._has_worked(now) or is_first else self._idle_s + gap_s
        self._sampled_at = now
        return self._idle_s

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Discount what a request of ours may cost: at most the time that it takes."""
        begun = self.clock()
        yield
        self._cpu_s -= min(self.clock() - begun, _PROBE_CPU_S)

    def _has_worked(self, now: float) -> bool:
        has_paged = self._count()
        heard, self._heard = self._heard, max(self._heard, self.server.output.unprompted_bytes)
        window = self._window
        window.append((now, self._cpu_s, self._moved_bytes))
        while len(window) > 2 and window[1][0] <= now - _WINDOW_S:
            window.popleft()
        since, cpu_s, moved_bytes = window[0]
        over_s = now - since
        is_busy = over_s > 0 and (
            self._cpu_s - cpu_s > _CPU_SHARE * over_s
            or self._moved_bytes - moved_bytes > _NOISE_BYTES * over_s
        )
        return has_paged or is_busy or self._heard > heard

    def _count(self) -> bool:
        """Add what each process has used since the last sample; return whether one has paged."""
        has_paged = False
        for pid in self.server.family() | self._known.keys():
            new = process_table.usage(pid)
            old = self._known.get(pid, Usage(new.start_ticks if new else 0))
            if new is None or new.start_ticks != old.start_ticks:  # another process has its pid
                self._known.pop(pid, None)
                continue
            grown = max(0, new.resident_bytes - old.resident_bytes)
            self._known[pid] = replace(new, resident_bytes=old.resident_bytes + grown)
            self._cpu_s += new.cpu_s - old.cpu_s
            self._moved_bytes += new.read_bytes - old.read_bytes + grown
            self.bytes_loaded = max(self.bytes_loaded, new.loaded_bytes)
            has_paged |= new.paged > old.paged
        return has_paged
