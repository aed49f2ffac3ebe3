"""The states of an entry of the pool, beside the six of its slot.

A server is in its slot only in Starting, Resident, Stopping and Stuck, and these four have a
reservation in the ledger. Failure is not a state: an entry whose start has failed is Absent.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """The state of an entry."""

    ABSENT = "Absent"
    STARTING = "Starting"
    RESIDENT = "Resident"
    STOPPING = "Stopping"
    STUCK = "Stuck"
    POOL = "Pool"  # of no entry: the rows of facts about the whole pool are there


OF_ENTRIES: Final = tuple(state for state in State if state is not State.POOL)
