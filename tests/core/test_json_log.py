"""llama-server's JSON log is read as the text that it would print without `--log-jsonl`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.server.json_log import Figure
from orchestrator.server.output import MAX_LINE_BYTES, OutputRing


def event(message: str, level: str = "info", at_us: int = 61_002_003) -> bytes:
    members = {"type": "log", "time": at_us, "level": level, "msg": message}
    return json.dumps(members, separators=(",", ":")).encode() + b"\n"


def breakdown(*rows: dict[str, Any]) -> bytes:
    members = {"type": "fit_memory_breakdown", "data": {"unit": "MiB", "rows": rows}}
    return json.dumps(members, separators=(",", ":")).encode() + b"\n"


def row(name: str, mib: int, model: int = 1, kind: str = "host") -> dict[str, Any]:
    return {"kind": kind, "name": name, "self": mib, "model": model, "context": 2, "compute": 3}


def lines(*pieces: bytes) -> tuple[str, ...]:
    ring = OutputRing()
    for piece in pieces:
        ring.feed(piece)
    ring.close()
    return ring.tail()


def test_message_is_a_line_with_its_time_and_level() -> None:
    assert lines(event("srv  load_model: loading\n")) == (
        "1.01.002.003 I srv  load_model: loading",
    )
    assert lines(event("no\n", "error", 0)) == ("0.00.000.000 E no",)


def test_message_of_several_lines_and_one_of_several_messages() -> None:
    pieces = [event("one\ntwo\n"), event("half"), event(".", "cont"), event(".\n", "cont")]
    assert lines(*pieces) == ("1.01.002.003 I one", "two", "1.01.002.003 I half..")


def test_message_without_an_end_is_a_line_when_the_output_ends() -> None:
    assert lines(event("whole\n"), event("half")) == (
        "1.01.002.003 I whole",
        "1.01.002.003 I half",
    )


def test_line_that_is_no_event_is_itself() -> None:
    """A loader or a wrapper prints before the log begins, and a library past it."""
    odd = [b"error while loading shared libraries", b'{"type":"other"}', b'{"type":"log"}', b"{"]
    assert lines(b"\n".join(odd) + b"\n", event("x\n")) == (
        *(line.decode() for line in odd),
        "1.01.002.003 I x",
    )


def test_address_is_read_from_a_message() -> None:
    ring = OutputRing()
    ring.feed(event("srv  llama_server: listening on http://127.0.0.1:43210\n"))
    assert ring.announced == ("http://127.0.0.1:43210",)


def test_message_hides_secrets_and_control_sequences() -> None:
    secret = "hf_" + "a" * 34
    (line,) = lines(event(f"\x1b[31mtoken {secret}\x1b[0m\n"))
    assert secret not in line
    assert "\x1b" not in line


@pytest.mark.parametrize("ending", ["", "\\", "\\u00", "\\ud83d"])
def test_message_over_the_longest_line_is_cut(ending: str) -> None:
    whole = event("\u00e9" * 10)[:-3]
    raw = whole + b"x" * (MAX_LINE_BYTES - len(whole) - len(ending)) + ending.encode()
    (line,) = lines(raw + b"more of it\n")
    assert line.startswith("1.01.002.003 I " + "\u00e9" * 10 + "xxx")


def test_figures_are_summed_by_device() -> None:
    """Host memory has rows of its own for pinned and repacked buffers."""
    ring = OutputRing()
    ring.feed(
        breakdown(
            row("CUDA0", 1500, 1200, "device"),
            row("Host", 46, 40),
            row("CUDA_Host", 7, 5, "buffer_type"),
        )
    )
    assert ring.figures == (Figure({"Host": 53, "CUDA0": 1500}, 1245),)
    assert ring.tail() == ("memory, MiB: Host 53, CUDA0 1500",)


@pytest.mark.parametrize(
    "rows",
    [
        [{"kind": "host", "name": "Host", "self": "5", "model": 1}],
        [{"kind": "host", "name": "Host", "self": -5, "model": 1}],
        [{"kind": "host", "name": "Host", "self": 5}],
        [row("Host", 1), 5],
    ],
)
def test_figures_of_another_shape_are_only_a_line(rows: list[Any]) -> None:
    ring = OutputRing()
    ring.feed(breakdown(*rows))
    assert ring.figures == ()
    assert ring.tail()[0].startswith('{"type":"fit_memory_breakdown"')


def test_figures_inside_a_message_are_text() -> None:
    """Metadata of a model is printed, and may hold anything."""
    ring = OutputRing()
    ring.feed(event("kv 1: x\n" + breakdown(row("Host", 1)).decode()))
    assert ring.figures == ()


@given(st.text(max_size=200), st.integers(1, 50))
def test_any_message_in_pieces_is_its_text(message: str, size: int) -> None:
    data = event(message.replace("\n", " ") + "\n", "cont")
    whole = OutputRing()
    whole.feed((message.replace("\n", " ") + "\n").encode("utf-8", "replace"))
    pieces = [data[n : n + size] for n in range(0, len(data), size)]
    assert lines(*pieces) == whole.tail()
