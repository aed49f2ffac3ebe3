"""Budgets and reservations on paper."""

from __future__ import annotations

import pytest

from orchestrator.pool.ledger import SERVERS, Amounts, Ledger, group_account, is_place

of = Amounts.of


def test_equal_amounts_are_equal_whatever_the_order_and_the_zeros() -> None:
    """Worlds of the checker are compared and hashed."""
    one, other = of({"Host": 1, "CUDA0": 2, "CUDA1": 0}), of({"CUDA0": 2, "Host": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert of({"Host": 0}) == Amounts()
    assert not Amounts()


def test_amounts_are_added_subtracted_and_compared_by_account() -> None:
    one, other = of({"Host": 3, "CUDA0": 5}), of({"Host": 3, "CUDA1": 1})
    assert one + other == of({"Host": 6, "CUDA0": 5, "CUDA1": 1})
    assert one - other == of({"CUDA0": 5, "CUDA1": -1})
    assert one.larger(other) == of({"Host": 3, "CUDA0": 5, "CUDA1": 1})
    assert of({"Host": 2, "CUDA0": 7}).larger(one) == of({"Host": 3, "CUDA0": 7})
    assert Amounts.total([one, other, one]) == of({"Host": 9, "CUDA0": 10, "CUDA1": 1})
    assert (one["CUDA0"], one["CUDA1"]) == (5, 0)
    assert str(of({"Host": 3, "CUDA0": 5, SERVERS: 1})) == "5 MiB of CUDA0 and 3 MiB of Host"


@pytest.mark.parametrize(
    ("need", "room", "fits"),
    [
        ({"Host": 3}, {"Host": 3}, True),
        ({"Host": 4}, {"Host": 3}, False),
        ({"Host": 1, "CUDA0": 1}, {"Host": 3}, False),
        ({"Host": 1}, {"Host": 1, "CUDA0": -5}, True),
        ({"Host": 1, "CUDA0": 1}, {"Host": 1, "CUDA0": -5}, False),
        ({}, {"Host": -1}, True),
    ],
)
def test_a_debt_matters_only_where_something_is_needed(
    need: dict[str, int], room: dict[str, int], fits: bool
) -> None:
    """A server that uses the host only may start while a GPU has a debt."""
    assert of(need).fits(of(room)) is fits
    assert bool(of(need).beyond(of(room))) is not fits


def test_what_is_lacking_includes_a_debt() -> None:
    """Evicting only for the need would leave the debt, and the start would not fit."""
    assert of({"Host": 3}).beyond(of({"Host": -2, "CUDA0": -9})) == of({"Host": 5})
    assert of({"Host": 3, "CUDA0": 1}).beyond(of({"Host": 1, "CUDA0": 4})) == of({"Host": 2})


def test_a_debt_is_what_is_negative() -> None:
    assert of({"Host": -2, "CUDA0": 9, "CUDA1": -1}).debt == of({"Host": 2, "CUDA1": 1})
    assert not of({"Host": 1}).debt


def test_a_need_within_a_room_is_cut_by_device_and_not_by_place() -> None:
    need = of({"Host": 9, "CUDA0": 4, SERVERS: 1})
    assert need.within(of({"Host": 5, "CUDA0": 6, SERVERS: 3})) == of(
        {"Host": 5, "CUDA0": 4, SERVERS: 1}
    )
    assert need.within(of({"Host": 5, SERVERS: 1})) is None
    assert need.within(of({"Host": 9, "CUDA0": 9})) is None


def test_a_reservation_lasts_until_it_is_released() -> None:
    ledger = (
        Ledger(of({"Host": 10})).reserving("b", of({"Host": 4})).reserving("a", of({"Host": 3}))
    )
    assert ledger.free == of({"Host": 3})
    assert ledger.total(["a", "b", "c"]) == of({"Host": 7})
    assert ledger.reserving("b", of({"Host": 9})).free == of({"Host": -2})
    assert ledger.releasing("b").free == of({"Host": 7})
    assert ledger.releasing("b").of("b") == Amounts()
    assert ledger.releasing("b").releasing("a") == Ledger(of({"Host": 10}))


def test_equal_ledgers_are_equal_whatever_was_reserved_first() -> None:
    empty, one = Ledger(of({"Host": 9})), of({"Host": 1})
    assert empty.reserving("a", one).reserving("b", one) == empty.reserving("b", one).reserving(
        "a", one
    )


def test_places_are_told_from_devices() -> None:
    assert is_place(SERVERS)
    assert is_place(group_account("large"))
    assert not is_place("CUDA0")
    assert of({"Host": 3, SERVERS: 1, group_account("x"): 1}).of_devices() == of({"Host": 3})


@pytest.mark.parametrize(
    ("room", "within"),
    [
        ({"Host": 9, SERVERS: 2}, {"Host": 5, SERVERS: 2}),
        ({"Host": 3, SERVERS: 2}, {"Host": 3, SERVERS: 2}),
        ({"Host": 1, SERVERS: 9}, {"Host": 1, SERVERS: 2}),
        ({"Host": 0, SERVERS: 2}, None),
        ({"Host": 3, SERVERS: 1}, None),
    ],
)
def test_a_server_may_fit_into_less_memory_but_takes_its_places(
    room: dict[str, int], within: dict[str, int] | None
) -> None:
    assert of({"Host": 5, SERVERS: 2}).within(of(room)) == (None if within is None else of(within))


def test_nothing_is_called_so() -> None:
    assert str(of({SERVERS: 1})) == "nothing"
