"""The tokens of a request, as its answer tells them: `usage` and llama.cpp's `timings`.

An answer is not parsed. Of one that passes, the first and the last kilobytes are kept until it has
ended; that is where these members are, and a text inside of it cannot look like them, because its
quotes are escaped.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_HEAD: Final = 1 << 11  # where vectors, or the messages of another API, have some
_TAIL: Final = 1 << 13
_PIECES: Final = 32  # an answer's last words may come in some of them
_BEGINNINGS: Final = (b'"usage"', b'"timings"')
_MEMBER: Final = re.compile(
    rb'"(prompt_tokens|completion_tokens|cached_tokens|input_tokens|output_tokens|'
    rb"cache_read_input_tokens|cache_n|prompt_n|predicted_n|predicted_per_second)"
    rb'"\s*:\s*(\d{1,12}(?!\d)(?:\.\d+)?)'
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What an answer says; None = nothing.

    Attributes:
        prompt: Tokens of the prompt, those from the cache included.
        per_s: Tokens of the answer by second.
    """

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    per_s: float | None = None


NOTHING: Final = Tokens()


class Heard:
    """Keeps what tells the tokens of an answer on its way."""

    __slots__ = ("_head", "_tail")

    def __init__(self) -> None:
        self._head = b""
        self._tail: deque[bytes] = deque(maxlen=_PIECES)

    def feed(self, data: bytes) -> None:
        if len(self._head) < _HEAD:
            self._head += data[: _HEAD - len(self._head)]
        self._tail.append(data if len(data) < _TAIL else data[-_TAIL:])

    def tokens(self) -> Tokens:
        """Return what the answer so far has said, the newest of each figure."""
        head, tail = self._head, b"".join(self._tail)[-_TAIL:]
        said = _said(head, head.find) | _said(tail, tail.rfind)
        if not said:
            return NOTHING
        cached = _first(said, b"cache_n", b"cached_tokens", b"cache_read_input_tokens")
        prompt = _first(said, b"prompt_tokens", b"input_tokens")
        if prompt is None and b"prompt_n" in said:
            prompt = said[b"prompt_n"] + (cached or 0)
        elif prompt is not None and b"cache_read_input_tokens" in said:  # Anthropic's API
            prompt += said[b"cache_read_input_tokens"]
        completion = _first(said, b"completion_tokens", b"output_tokens", b"predicted_n")
        per_s = _first(said, b"predicted_per_second")
        return Tokens(_whole(prompt), _whole(cached), _whole(completion), per_s)


def _said(text: bytes, find: Callable[[bytes], int]) -> dict[bytes, float]:
    places = [place for one in _BEGINNINGS if (place := find(one)) >= 0]
    if not places:
        return {}
    return {found[1]: float(found[2]) for found in _MEMBER.finditer(text, min(places))}


def _first(said: dict[bytes, float], *names: bytes) -> float | None:
    return next((said[name] for name in names if name in said), None)


def _whole(figure: float | None) -> int | None:
    return None if figure is None else int(figure)
