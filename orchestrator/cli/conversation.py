"""One streamed chat request, with the times that its reader notices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.cli.output import Failure
from orchestrator.runtime.service import Exchange, Service

_DATA: Final = "data: "
_DONE: Final = "[DONE]"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered.

    Attributes:
        text: The whole answer.
        tokens: How many tokens the server counted, the one that ends the answer included.
        first_token_s: From the request to the first text, in seconds.
        total_s: From the request to the end, in seconds.
    """

    text: str
    tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)


def ask(
    service: Service,
    request: dict[str, Any],
    *,
    timeout_s: float | None = None,
    on_text: Callable[[str], object] = lambda _: None,
) -> Answer:
    """Send a chat request and read its answer as it comes.

    Args:
        service: What answers below `/v1`: a leased server, or an orchestrator's service.
        timeout_s: The longest pause of the answer.
        on_text: Called with each piece of the answer.

    Raises:
        OrchestratorError: It is refused, or the service is not there.
        Failure: The answer breaks off, or there is none.
    """
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    texts: list[str] = []
    first_s = end_s = 0.0
    tokens = 0
    began = time.perf_counter()
    for chunk in _chunks(service, body, timeout_s):
        for choice in chunk.get("choices", ()):
            end_s = time.perf_counter() - began
            if text := choice["delta"].get("content"):
                first_s = first_s or end_s
                texts.append(text)
                on_text(text)
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if not texts or not tokens:
        raise Failure({"title": "No answer", "detail": "the stream ended before its answer"})
    return Answer("".join(texts), tokens, first_s, end_s)


def _chunks(
    service: Service, body: dict[str, Any], timeout_s: float | None
) -> Iterator[dict[str, Any]]:
    path = "/v1/chat/completions"
    with contextlib.closing(
        Exchange(service, "POST", path, body, timeout_s=timeout_s).open()
    ) as lines:
        for line in lines:
            if line.startswith(_DATA) and (data := line.removeprefix(_DATA)) != _DONE:
                chunk = service.understood(dict, data)
                if "error" in chunk:
                    raise Failure({"title": "The answer failed", "detail": str(chunk["error"])})
                yield chunk
