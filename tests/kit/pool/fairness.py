"""Cycles in which something waits for ever although everything that can happen does happen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Cause = tuple[str, int]
"""The kind of a move, and the model it is about (-1: none)."""
FAIR = frozenset({"slot", "report", "tick", "done"})


class Link(NamedTuple):
    """A move to another world, by number."""

    cause: Cause
    to: int


def components(count: int, nexts: Callable[[int], Iterable[int]]) -> list[int]:
    """Return the strongly connected component of each node (Tarjan, without recursion)."""
    index, low, found = [0] * count, [0] * count, [-1] * count
    on_stack, stack, counter, components_ = bytearray(count), [], 1, 0
    for root in range(count):
        if index[root]:
            continue
        index[root] = low[root] = counter
        counter += 1
        stack.append(root)
        on_stack[root] = 1
        work = [(root, iter(nexts(root)))]
        while work:
            node, others = work[-1]
            for other in others:
                if not index[other]:
                    index[other] = low[other] = counter
                    counter += 1
                    stack.append(other)
                    on_stack[other] = 1
                    work.append((other, iter(nexts(other))))
                    break
                if on_stack[other]:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    member = -1
                    while member != node:
                        member = stack.pop()
                        on_stack[member] = 0
                        found[member] = components_
                    components_ += 1
    return found


def fair_cycle(
    links: Sequence[Sequence[Link]], holds: Sequence[bool], without: frozenset[Cause]
) -> int | None:
    """Return a world of a cycle in which `holds` is always true, or None.

    Moves of the `without` causes do not happen in it. The cycle is weakly fair: a fair move that is
    possible all the way round is made on the way round.
    """
    if not any(holds):
        return None

    def nexts(at: int) -> list[int]:
        if not holds[at]:
            return []
        return [link.to for link in links[at] if holds[link.to] and link.cause not in without]

    found = components(len(links), nexts)
    members: dict[int, list[int]] = {}
    for at, component in enumerate(found):
        if holds[at]:
            members.setdefault(component, []).append(at)
    for component, worlds in members.items():
        if len(worlds) == 1 and worlds[0] not in nexts(worlds[0]):
            continue
        taken: set[Cause] = set()
        always: set[Cause] | None = None
        for at in worlds:
            here = {link.cause for link in links[at] if link.cause[0] in FAIR}
            always = here if always is None else always & here
            taken |= {
                link.cause
                for link in links[at]
                if link.cause in here and holds[link.to] and found[link.to] == component
            }
        if always is not None and always <= taken:
            return min(worlds)
    return None
