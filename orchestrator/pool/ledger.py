"""Memory on paper: the budget, and what each entry has reserved of it.

Amounts are MiB by device. A reservation is made in the step that decides to start a server, and
released when its slot is verified empty. Places are accounts like devices: each server takes 1 of
`SERVERS`, and 1 of its group, whose budget is 1. So a full group is a full device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

SERVERS: Final = "resident servers"
NO_LIMIT: Final = 1 << 30


def group_account(group: str) -> str:
    return f"group {group}"


def is_place(account: str) -> bool:
    """Whether an account counts servers, not MiB. Names of devices have no space."""
    return " " in account


@dataclass(frozen=True, slots=True)
class Amounts:
    """Amounts by account, without zeros and sorted, so that equal ones compare equal."""

    by_account: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, amounts: Mapping[str, int]) -> Self:
        return cls(tuple(sorted((account, n) for account, n in amounts.items() if n)))

    @classmethod
    def total(cls, some: Iterable[Amounts]) -> Self:
        found: dict[str, int] = {}
        for amounts in some:
            for account, n in amounts.by_account:
                found[account] = found.get(account, 0) + n
        return cls.of(found)

    def __getitem__(self, account: str) -> int:
        return next((n for known, n in self.by_account if known == account), 0)

    def __str__(self) -> str:
        """The amounts of devices in words; places are left out."""
        parts = (f"{n} MiB of {name}" for name, n in self.by_account if not is_place(name))
        return " and ".join(parts) or "nothing"

    def __bool__(self) -> bool:
        return bool(self.by_account)

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts.total((self, other))

    def __sub__(self, other: Amounts) -> Amounts:
        return self + Amounts(tuple((account, -n) for account, n in other.by_account))

    def of_devices(self) -> Amounts:
        """Return it without the places."""
        return Amounts(tuple(one for one in self.by_account if not is_place(one[0])))

    def larger(self, other: Amounts) -> Amounts:
        """Return the larger amount of each account."""
        accounts = dict((*self.by_account, *other.by_account))
        return Amounts.of({account: max(self[account], other[account]) for account in accounts})

    def fits(self, room: Amounts) -> bool:
        """Whether `room` has all of it. A debt of an account that is not needed does not matter."""
        return all(n <= room[account] for account, n in self.by_account)

    def beyond(self, room: Amounts) -> Amounts:
        """Return what `room` lacks of it; a debt of an account that is needed counts."""
        lacking = {account: n - room[account] for account, n in self.by_account}
        return Amounts.of({account: n for account, n in lacking.items() if n > 0})

    @property
    def debt(self) -> Amounts:
        """What is missing where the amount is negative."""
        return Amounts(tuple((account, -n) for account, n in self.by_account if n < 0))

    def within(self, room: Amounts) -> Amounts | None:
        """Return as much of it as `room` has, or None if that is nothing, or a place is missing."""
        if any(room[account] < (n if is_place(account) else 1) for account, n in self.by_account):
            return None
        return Amounts.of({account: min(n, room[account]) for account, n in self.by_account})


@dataclass(frozen=True, slots=True)
class Ledger:
    """The budget of each account, and the reservations by entry."""

    budget: Amounts = field(default_factory=Amounts)
    reservations: tuple[tuple[str, Amounts], ...] = ()

    def of(self, name: str) -> Amounts:
        return next((held for known, held in self.reservations if known == name), Amounts())

    def total(self, names: Iterable[str]) -> Amounts:
        """Return what these entries have reserved."""
        return Amounts.total(map(self.of, names))

    @property
    def free(self) -> Amounts:
        """What is left of the budget; negative where it has become smaller than what is held."""
        return self.budget - Amounts.total(held for _, held in self.reservations)

    def reserving(self, name: str, amounts: Amounts) -> Ledger:
        """Return the ledger with this reservation of the entry in place of its last one."""
        others = self.releasing(name).reservations
        return Ledger(self.budget, tuple(sorted((*others, (name, amounts)), key=lambda r: r[0])))

    def releasing(self, name: str) -> Ledger:
        others = tuple(known for known in self.reservations if known[0] != name)
        return Ledger(self.budget, others)
