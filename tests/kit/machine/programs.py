"""Programs of concurrent clients, as text.

Clients are separated by `|`, the calls of one client by `;`:

    load A slow id=x | load B queue; withdraw | unload

A client does not wait for its answers, except that a lease is released only after it was granted,
so every order of arrival is explored. The look-up of a `slow` load takes a while, that of any other
ends at once. A `late` load has its place in the order of calls before it arrives; a `late` lease
has found no server, and may arrive when there is one. A model with a
`/` in its name is on the Hub and must be resolved; its load may say `prefetch`, and `prefetch o/A`
only downloads it. `cancel x` is by id, `cancel` alone by the generation of the client's last load;
`withdraw` means the client's last call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.settings.request import LoadRequest

Verb = Literal["load", "prefetch", "unload", "cancel", "withdraw", "lease", "release", "shutdown"]


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a client; `refers` is the index of the call it is about, or its own."""

    verb: Verb
    text: str
    index: int
    refers: int
    request: LoadRequest | None = None
    model: str | None = None
    request_id: str | None = None
    is_slow: bool = False
    is_late: bool = False
    cuts: bool = False


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
                is_late="late" in words,
            )
        case "unload":
            cuts = "cut" in words
            model = next((word for word in words if word != "cut"), None)
            return Action(verb, text, index, index, model=model, cuts=cuts)
        case "lease" | "shutdown":
            return Action(verb, text, index, index, is_late="late" in words)
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
    values: dict[str, str | bool | float] = {"model_path": words[0]}
    for option in words[1:]:
        if option.startswith("id="):
            values["load_request_id"] = option.removeprefix("id=")
        elif option in _OPTIONS:
            values |= _OPTIONS[option]
        else:
            raise ValueError(f"not an option of load: {option!r}")
    return LoadRequest.from_dict(values)


_OPTIONS: dict[str, dict[str, str | bool | float]] = {
    "slow": {},
    "late": {},
    "queue": {"on_busy": "queue"},
    "reject": {"on_busy": "reject"},
    "force": {"force_reload": True},
    "restore": {"restore_previous": True},
    "prefetch": {"prefetch": True},
    "pinned": {"pinned": True},
    "deadline": {"deadline_s": 1.0},
}
