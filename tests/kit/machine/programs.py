"""Small programs for callers, as text.

Clients are separated by `|`, what one client does one after the other by `;`:

    load A slow id=x | load B queue; withdraw | unload

A client never waits for its answers (except that a lease is released after it was granted), so
every order of arrival is explored. `slow` is a load whose model takes a while to be looked up: it
has its place in the order of calls first and arrives later. A model with a `/` in its name is on
the Hub, which is asked first; a load of it may say `prefetch`, and `prefetch o/A` fetches it and no
more. `cancel x` is by id, `cancel` alone by
the generation of the client's last load; `withdraw` means the client's last call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from orchestrator.settings.request import LoadRequest

Verb = Literal["load", "prefetch", "unload", "cancel", "withdraw", "lease", "release", "shutdown"]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a client does; `refers` is the index of the call it is about (its own, if none)."""

    verb: Verb
    text: str
    index: int
    refers: int
    request: LoadRequest | None = None
    model: str | None = None
    request_id: str | None = None
    is_slow: bool = False


def parse(program: str) -> tuple[tuple[Action, ...], ...]:
    """Return the actions of each client of a program.

    Raises:
        ValueError: the text is not a program.
    """
    clients: list[tuple[Action, ...]] = []
    count = 0
    for client in program.split("|"):
        actions: list[Action] = []
        for text in client.split(";"):
            actions.append(_parse_action(text.strip(), count, actions))
            count += 1
        clients.append(tuple(actions))
    return tuple(clients)


def _parse_action(text: str, index: int, earlier: list[Action]) -> Action:
    verb, *words = text.split()
    match verb:
        case "load" | "prefetch":
            request = _request(words)
            return Action(
                verb,
                text,
                index,
                index,
                request,
                request_id=request.load_request_id,
                is_slow="slow" in words,
            )
        case "unload":
            return Action(verb, text, index, index, model=words[0] if words else None)
        case "lease" | "shutdown":
            return Action(verb, text, index, index)
        case "cancel" if words:
            return Action(verb, text, index, index, request_id=words[0])
        case "cancel":
            load = next(a for a in reversed(earlier) if a.verb == "load")
            return Action(verb, text, index, load.index)
        case "withdraw":
            call = next(a for a in reversed(earlier) if a.verb not in {"withdraw", "release"})
            return Action(verb, text, index, call.index)
        case "release":
            lease = next(a for a in reversed(earlier) if a.verb == "lease")
            return Action(verb, text, index, lease.index)
        case _:
            raise ValueError(f"not an action: {text!r}")


def _request(words: list[str]) -> LoadRequest:
    name, *options = words
    known = re.compile(r"slow|queue|reject|force|restore|prefetch|deadline|pinned|id=(\S+)")
    values: dict[str, str | bool | float] = {"model_path": name}
    for option in options:
        found = known.fullmatch(option)
        if found is None:
            raise ValueError(f"not an option of load: {option!r}")
        if option in {"queue", "reject"}:
            values["on_busy"] = option
        elif option == "force":
            values["force_reload"] = True
        elif option == "restore":
            values["restore_previous"] = True
        elif option == "prefetch":
            values["prefetch"] = True
        elif option == "pinned":
            values["pinned"] = True
        elif option == "deadline":
            values["deadline_s"] = 1.0
        elif found.group(1):
            values["load_request_id"] = found.group(1)
    return LoadRequest.from_dict(values)
