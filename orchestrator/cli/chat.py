"""`chat`: one conversation with the loaded model, as it streams."""

from __future__ import annotations

import sys
from typing import Any

from orchestrator.cli import INTERRUPTED, by_name, options
from orchestrator.cli.conversation import Answer, ask
from orchestrator.cli.loading import loading_shown
from orchestrator.cli.output import Failure, say, say_json, say_piece
from orchestrator.cli.services import MODEL, Served, remote_command
from orchestrator.runtime.service import Service


@remote_command(*MODEL, *options.START, cls=options.ModelCommand)
def chat(*, served: Served, as_json: bool, **fields: Any) -> int:
    """Talk to the loaded model; with MODEL, load that first. Ctrl-D ends the conversation.

    Ctrl-C stops an answer. Reads one message a line, and works in a pipe too. Where the service is
    a pool, MODEL is a name of its catalogue, with or without a preset.
    """
    request = _made_ready(served, fields, as_json=as_json)
    service = Service(served.url, served.orch.api_key)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            return INTERRUPTED
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            answer = _answered(service, {**request, "messages": messages}, pieces, as_json=as_json)
        except KeyboardInterrupt:
            say("", ("  stopped", "dim"))
        except Failure as error:
            error.show()
        else:
            _say_speed(text, answer, as_json=as_json)
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _made_ready(served: Served, fields: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """Load the model that is named, and return what every request says besides its messages."""
    if served.pool is not None:
        name, _ = by_name.by_hand(**fields)
        if name is None:
            return {}  # the default answers
        with loading_shown(served.slot(name), is_silent=as_json), served.pool.lease(name):
            return {"model": name}
    if fields["model"] or fields["model_option"]:
        with loading_shown(served.orch, is_silent=as_json):
            served.orch.load(options.load_request(**fields))
    with served.orch.lease():
        return {}


def _answered(
    service: Service, request: dict[str, Any], pieces: list[str], *, as_json: bool
) -> Answer:
    def take(piece: str) -> None:
        pieces.append(piece)
        if not as_json:
            say_piece(piece)

    return ask(service, request, on_text=take)


def _say_speed(text: str, answer: Answer, *, as_json: bool) -> None:
    first_ms = answer.first_token_s * 1000
    if as_json:
        speed = {"first_token_ms": round(first_ms, 3), "tokens_per_s": answer.tokens_per_s}
        said = {"message": text, "answer": answer.text, "tokens": answer.tokens}
        say_json({**said, **speed}, one_line=True)
        return
    say("")
    rate = f"{answer.tokens_per_s:,.0f} tokens per second"
    say((f"  {answer.tokens} tokens, {rate}, the first after {first_ms:,.0f} ms", "dim"))
