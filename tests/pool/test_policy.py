"""Who is next and who goes, against exhaustive search."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from orchestrator.base.tokens import Ticket
from orchestrator.pool import policy
from orchestrator.pool.context import Turn, Turns, Waiter
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.policy import (
    EXHAUSTIVE,
    Candidate,
    Wait,
    after_turns,
    cheapest,
    cost_of,
    in_order,
    in_turn,
)

of = Amounts.of


def names(waits: list[Wait], *, max_wait_s: float = 30.0, at: float = 100.0) -> list[str]:
    return [wait.name for wait in in_order(waits, max_wait_s, at)]


# ------------------------------------------------------------------------------------ who is next
def test_the_largest_weight_times_wait_goes_first() -> None:
    assert names([Wait("a", 90.0), Wait("b", 95.0, weight=3.0), Wait("c", 85.0)]) == ["b", "c", "a"]


def test_past_max_wait_the_longest_wait_goes_first_whatever_its_weight() -> None:
    """Otherwise a large weight starves the others."""
    waits = [Wait("a", 69.0, weight=0.001), Wait("b", 70.0, weight=9.0), Wait("c", 99.0, 1e9)]
    assert names(waits) == ["a", "b", "c"]
    assert names(waits[1:], max_wait_s=30.5) == ["c", "b"]


def test_between_equal_waits_the_order_of_arrival_decides() -> None:
    assert names([Wait("b", 90.0), Wait("a", 90.0)]) == ["b", "a"]
    assert names([Wait("b", 10.0), Wait("a", 10.0)]) == ["b", "a"]


# --------------------------------------------------------------------------------------- who goes
def test_cost_is_bytes_by_time_since_the_last_use() -> None:
    assert cost_of(800, 0.0) == 800
    assert cost_of(800, 3.0) == 200


def one(name: str, cost: float, **frees: int) -> Candidate:
    return Candidate(name, of(frees), cost)


def test_the_cheapest_set_that_is_enough_goes() -> None:
    a, b, c = one("a", 5.0, Host=4), one("b", 2.0, Host=2), one("c", 2.0, Host=2)
    assert cheapest(of({"Host": 2}), [a, b, c]) == ("b",)
    assert cheapest(of({"Host": 4}), [a, b, c]) == ("b", "c")
    assert cheapest(of({"Host": 3}), [a, b]) == ("a",)
    assert cheapest(of({"Host": 9}), [a, b, c]) is None


def test_of_sets_that_cost_the_same_the_smaller_goes() -> None:
    assert cheapest(of({"Host": 2}), [one("a", 0.0, Host=1), one("b", 0.0, Host=2)]) == ("b",)
    assert cheapest(of({"Host": 2}), [one("a", 1.0, Host=2), one("b", 1.0, Host=2)]) == ("a",)


def test_who_frees_nothing_that_is_missing_stays() -> None:
    assert cheapest(of({"CUDA0": 1}), [one("a", 0.0, Host=9), one("b", 9.0, CUDA0=1)]) == ("b",)
    assert cheapest(Amounts(), [one("a", 0.0, Host=9)]) == ()


def _best(lack: Amounts, candidates: list[Candidate]) -> float | None:
    """Search every set, as simply as possible."""
    costs = [
        sum(one.cost for one in some)
        for n in range(len(candidates) + 1)
        for some in combinations(candidates, n)
        if lack.fits(Amounts.total(one.frees for one in some))
    ]
    return min(costs, default=None)


def _random_case(seed: int, most: int) -> tuple[Amounts, list[Candidate]]:
    dice = random.Random(seed)
    devices = ["Host", "CUDA0", "CUDA1"][: dice.randint(1, 3)]

    def amounts(largest: int) -> Amounts:
        return of({device: dice.choice([0, dice.randint(1, largest)]) for device in devices})

    candidates = [
        Candidate(f"m{n}", amounts(24_000), dice.choice([0.0, dice.uniform(1, 9e9)]))
        for n in range(dice.randint(1, most))
    ]
    return amounts(40_000), candidates


@pytest.mark.parametrize("seed", range(300))
def test_the_choice_is_the_optimum_of_up_to_eight_models(seed: int) -> None:
    lack, candidates = _random_case(seed, most=8)
    chosen, best = cheapest(lack, candidates), _best(lack, candidates)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        cost = sum(one.cost for one in candidates if one.name in chosen)
        assert cost == pytest.approx(best)


@pytest.mark.parametrize("seed", range(40))
def test_beyond_the_exhaustive_search_the_choice_is_enough_and_has_nothing_superfluous(
    seed: int,
) -> None:
    lack, candidates = _random_case(seed, most=8)
    candidates += [one(f"x{n}", float(n), Host=10, CUDA0=n) for n in range(EXHAUSTIVE)]
    chosen = cheapest(lack, candidates)
    if chosen is None:
        assert not lack.fits(Amounts.total(one.frees for one in candidates))
        return
    going = [one for one in candidates if one.name in chosen]
    assert lack.fits(Amounts.total(one.frees for one in going))
    for spared in going:
        rest = [one for one in going if one is not spared]
        assert not lack.fits(Amounts.total(one.frees for one in rest))


# Of 10 that are missing the cheapest for what it frees leaves 1 to a dear one; `c` has all of it.
LURED = [one("a", 5.0, Host=9), one("b", 3.0, Host=1), one("c", 7.0, Host=10)]
DEAR = [one(f"x{n}", 1e6, Host=1) for n in range(EXHAUSTIVE)]


def test_search_is_exhaustive_up_to_its_limit_and_greedy_beyond() -> None:
    lack = of({"Host": 10})
    assert cheapest(lack, [*LURED, *DEAR[3:]]) == ("c",)
    assert set(cheapest(lack, [*LURED, *DEAR[2:]]) or ()) == {"a", "b"}


def test_greedy_takes_what_is_cheapest_for_what_it_frees_of_what_is_missing() -> None:
    small = [one(f"s{n}", 1.0, Host=2) for n in range(EXHAUSTIVE)]
    assert cheapest(of({"Host": 10}), [*small, one("big", 3.0, Host=10)]) == ("big",)
    assert cheapest(of({"Host": 10}), [*small, one("huge", 6.0, Host=99)]) != ("huge",)
    other = [*small, one("gpu", 1.0, CUDA0=4), one("both", 1.5, Host=10, CUDA0=4)]
    assert cheapest(of({"Host": 10, "CUDA0": 4}), other) == ("both",)


def test_greedy_returns_the_dearest_of_what_is_superfluous() -> None:
    some = [one("a", 1.0, Host=3), one("b", 2.0, Host=4), one("c", 9.0, Host=7), *DEAR]
    assert set(cheapest(of({"Host": 10}), some) or ()) == {"a", "c"}


def test_greedy_is_hardly_ever_worse_than_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 95 % of it in all but one of a hundred cases, against exhaustive search."""
    monkeypatch.setattr(policy, "EXHAUSTIVE", 0)
    shares = []
    for seed in range(1000):
        lack, candidates = _random_case(seed, most=8)
        if best := _best(lack, candidates):
            chosen = cheapest(lack, candidates) or ()
            shares.append(best / sum(one.cost for one in candidates if one.name in chosen))
    assert len(shares) > 100
    assert sum(share >= 0.95 for share in shares) >= 0.99 * len(shares)


# ------------------------------------------------------------------------------------- whose turn
def requests(keys: str) -> list[Waiter]:
    """Return one request for each letter: `h` has weight 2, a dot has no key."""
    weights = {"h": 2.0}
    return [
        Waiter("m", "request", 0.0, Ticket(n), Turn(None if k == "." else k, weights.get(k, 1.0)))
        for n, k in enumerate(keys)
    ]


def order(keys: str, turns: Turns = ()) -> str:
    return "".join(one.turn.key or "." for one in in_turn(requests(keys), turns))


@pytest.mark.parametrize(
    ("keys", "turns", "expected"),
    [
        ("", (), ""),
        ("aaabbb", (), "ababab"),
        ("bbbaaa", (), "bababa"),
        ("hhhhll", (), "hlhhlh"),
        ("llhhhh", (), "lhhlhh"),
        ("..aa", (), ".a.a"),
        ("aabb", (("a", 1.0),), "baba"),
        ("aabb", (("a", 9.0),), "bbaa"),
        ("aabb", (("a", 1.0), ("b", 2.0)), "aabb"),
    ],
)
def test_keys_take_turns_by_weight(keys: str, turns: Turns, expected: str) -> None:
    """Of equals the one whose request is the oldest."""
    assert order(keys, turns) == expected


def test_requests_of_one_key_come_in_their_order() -> None:
    tickets = [one.ticket for one in in_turn(requests("abab"), ())]
    assert tickets == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("turns", "admitted", "left", "expected"),
    [
        ((), "ah", "ah", (("a", 0.5),)),
        ((("a", 1.0),), "a", "ab", (("a", 2.0),)),
        ((("a", 1.0),), "b", "ab", ()),
        ((("a", 1.0),), "bbb", "ab", (("b", 2.0),)),
        ((("a", 3.0),), "b", "b", (("a", 2.0),)),
        ((), "ab", "c", (("a", 1.0), ("b", 1.0))),
        ((), "b.a", "c", ((None, 1.0), ("a", 1.0), ("b", 1.0))),
        ((("a", 3.0),), "a", "", ()),
    ],
)
def test_turns_count_from_the_key_that_has_had_least(
    turns: Turns, admitted: str, left: str, expected: Turns
) -> None:
    """Who comes back has no credit for its absence, and nothing grows without bound."""
    assert after_turns(turns, requests(admitted), requests(left)) == expected
