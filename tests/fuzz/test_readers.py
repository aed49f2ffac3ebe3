"""Everything that is read from outside gives a value or one of our errors, in bounded time.

That is: files that others may have written, messages of a child process, answers of a server. The
help, settings, redaction and HTTP have such tests beside their others.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.cli.options import split
from orchestrator.errors import InvalidModel, OrchestratorError, Problem
from orchestrator.machine.facts import ServerFacts
from orchestrator.models import gguf_file
from orchestrator.models.hub.fetch_process import MAX_MESSAGE_BYTES, FetchProcess, FetchProgress
from orchestrator.models.hub.records import Records
from orchestrator.models.hyperparameters import Hyperparameters, hyperparameters
from orchestrator.runtime import events
from orchestrator.runtime.events import EventLog
from orchestrator.server import binaries, failures, readiness, talk
from orchestrator.server.output import MAX_LINE_BYTES, MAX_LINES, OutputRing
from orchestrator.server.slot import Slot
from orchestrator.settings.files import FileIdentity
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.request import LoadRequest

repeatable = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
DEEP = "[" * 100_000


def shaped(*names: str) -> st.SearchStrategy[Any]:
    """Objects with these members, of any type."""
    return st.dictionaries(st.sampled_from(names), JSON)


def encoded(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(json.dumps).map(str.encode)


# ----------------------------------------------------------------------------------- our own files


@repeatable
@given(
    st.binary(max_size=200)
    | encoded(JSON)
    | encoded(
        st.fixed_dictionaries(
            {},
            optional={
                "version": st.integers(0, 3) | JSON,
                "host": shaped("pid", "start_ticks", "boot_id") | JSON,
                "server": shaped("pid", "start_ticks", "boot_id") | JSON,
            },
        )
    )
)
@example(DEEP.encode())
@example(b'{"version": 1, "host": {"pid": 1' + b"0" * 5000 + b"}}")
def test_damaged_slot_record_names_no_process(tmp_path: Path, content: bytes) -> None:
    """A recorded pid is killed, so a record must be whole to be used."""
    slot = Slot("fuzzed", tmp_path)
    slot.record_path.parent.mkdir(parents=True, exist_ok=True)
    slot.record_path.write_bytes(content)
    server = slot.recall()
    assert server is None or 1 < server.pid < 1 << 31


@repeatable
@given(encoded(JSON | shaped("files")) | st.binary(max_size=100))
@example(DEEP.encode())
@example(b'{"files": {"a": [Infinity, ""]}}')
def test_damaged_listing_record_is_ignored(tmp_path: Path, content: bytes) -> None:
    """It costs a request, and must not fail a load."""
    records = Records(tmp_path)
    path = records.listing_path("owner/name", "c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert isinstance(records.listing("owner/name", "c"), dict)


@repeatable
@given(encoded(JSON | shaped("flags")) | st.binary(max_size=100))
@example(DEEP.encode())
def test_damaged_record_of_the_help_is_ignored(tmp_path: Path, content: bytes) -> None:
    """Or every flag of the server would be unknown."""
    identity = FileIdentity(f"/llama{hash(content)}", 1, 1, 1, 1)
    note = binaries._file_of((identity.path,), identity, str(tmp_path))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_bytes(content)
    known = binaries._known((identity.path,), identity, str(tmp_path))
    assert known is None or isinstance(known, Catalogue)


# ---------------------------------------------------------------------------- the fetcher process


class FakeFetcher(FetchProcess):
    """No process, but pieces of its output."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        request = LoadRequest(model_path="owner/name")
        super().__init__(request, "owner/name", CancelToken(Generation(1)), FetchProgress())
        self._pieces = list(pieces)
        self._process = SimpleNamespace(  # type: ignore[assignment]
            stdin=io.BytesIO(), wait=lambda _: 0, returncode=0
        )
        self._errors = io.BytesIO(b"an error")
        self.most_buffered = 0

    def _wait(self, ends_at: float) -> bool:
        if not self._pieces:
            return False
        self._buffer += self._pieces.pop(0)
        self.most_buffered = max(self.most_buffered, len(self._buffer))
        return True


MESSAGES = shaped(
    "error",
    "listing",
    "verified",
    "finished",
    "done",
    "file",
    "all",
    "seen",
    "waiting",
    "message",
    "category",
) | st.fixed_dictionaries({"error": shaped("message", "category", "field", "reason") | JSON})
PIECES = st.lists(
    st.binary(max_size=40)
    | encoded(MESSAGES).map(lambda line: line + b"\n")
    | encoded(JSON).map(lambda line: line + b"\n"),
    max_size=8,
)


@repeatable
@given(PIECES)
@example([DEEP.encode() + b"\n"])
@example([b"a warning of some library\n", b'{"listing": {"files": []}}\n'])
def test_any_output_of_the_fetcher_is_used_or_one_of_our_errors(pieces: list[bytes]) -> None:
    """Such as a warning of a library, or half a line of a process that was killed."""
    with contextlib.suppress(OrchestratorError):
        assert isinstance(FakeFetcher(pieces).listing(1.0), dict)
    with contextlib.suppress(OrchestratorError):
        FakeFetcher(pieces).fetch({"files": [{"name": "a", "size": 1}]}, lambda _: None)


def test_lines_that_a_library_prints_in_the_fetcher_are_ignored() -> None:
    pieces = [b"Warning: this is fine\n\xff\n[1]\n", b'{"listing": {"commit": "c"}}\n']
    assert FakeFetcher(pieces).listing(1.0) == {"commit": "c"}


def test_endless_line_of_the_fetcher_is_an_error() -> None:
    """It must not exhaust the memory of the host."""
    fetcher = FakeFetcher([b"x" * (MAX_MESSAGE_BYTES // 2)] * 8)
    with pytest.raises(OrchestratorError, match=r"a line of more than \d+ bytes"):
        fetcher.listing(1.0)
    assert fetcher.most_buffered <= 2 * MAX_MESSAGE_BYTES


# ------------------------------------------------------------------------------------- the server


@repeatable
@given(st.binary(max_size=100), st.booleans())
@example(b"HTTP/1.1 " + b"2" * 5000 + b"\r\n\r\n", True)
@example(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n", True)
@example(b"HTTP/1.1 200\r\ncontent-length:0\r\n\r\n", False)
def test_any_bytes_on_the_probe_socket_are_an_answer_or_none(data: bytes, ended: bool) -> None:
    for answer in (data, b"HTTP/1.1 200 OK\r\n" + data, b"HTTP/1.1 200 OK\r\n\r\n" + data):
        ours, theirs = socket.socketpair()
        with theirs, talk._BoundedSocket(fileno=ours.detach()) as probe:
            theirs.sendall(answer)
            if ended:
                theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(*talk.NO_ANSWER):
                status, body = talk.Talk(1, lambda _: probe).ask("/health", 0.01)
                assert isinstance(status, int)
                assert isinstance(body, bytes)


@repeatable
@given(
    st.binary(max_size=60)
    | encoded(JSON)
    | encoded(shaped("default_generation_settings", "modalities", "vision", "n_ctx"))
    | encoded(
        st.fixed_dictionaries(
            {"default_generation_settings": shaped("n_ctx")},
            optional={"modalities": shaped("vision") | JSON},
        )
    )
)
@example(b'{"default_generation_settings": {"n_ctx": 8}, "modalities": null}')
@example(DEEP.encode())
def test_any_properties_of_a_server_are_accepted(props: bytes) -> None:
    """A server that is ready must not fail a load by how it describes itself."""
    facts = readiness._facts("http://127.0.0.1:1", props)
    assert isinstance(facts, ServerFacts)
    assert facts.context_length is None or type(facts.context_length) is int
    assert type(facts.is_vision) is bool


@repeatable
@given(st.lists(st.binary(max_size=300) | st.just(b"\n" * 300), max_size=12))
def test_output_ring_is_bounded_and_counts_lines(pieces: list[bytes]) -> None:
    """A server may print for weeks."""
    ring = OutputRing()
    for piece in pieces:
        ring.feed(piece)
    ring.close()
    data = b"".join(pieces)
    assert ring.unprompted_bytes == len(data)
    assert ring.lines_seen == data.count(b"\n") + bool(data.rpartition(b"\n")[2])
    total, lines = ring.since(0)
    assert total == ring.lines_seen
    assert len(lines) == min(total, MAX_LINES)
    assert ring.tail(len(lines)) == lines


def test_flood_of_output_takes_bounded_memory() -> None:
    """With lines, and without any."""
    ring = OutputRing()
    for _ in range(64):
        ring.feed(b"x" * 65536)
    assert len(ring._partial) <= MAX_LINE_BYTES
    for number in range(4000):
        ring.feed(b"listening on http://127.0.0.1:%d\n" % number)
    assert len(ring._lines) == MAX_LINES
    assert len(ring.announced) <= 16


@repeatable
@given(
    st.none() | st.integers(-70, 300),
    st.lists(st.text(max_size=60) | st.sampled_from(("error: x", "main: exiting", "{0}%s"))).map(
        tuple
    ),
    st.lists(st.text(max_size=12)).map(tuple),
)
def test_any_exit_of_a_server_is_explained(
    returncode: int | None, lines: tuple[str, ...], extra_args: tuple[str, ...]
) -> None:
    """In one sentence, whatever it printed last."""
    problem = failures.explain(returncode, lines, extra_args)
    assert isinstance(problem, Problem)
    assert problem.message
    assert len(problem.message) < 2000


# ---------------------------------------------------------------------------------- model files

NUMBERS = st.integers(0, 20) | st.sampled_from((1 << 24, 1 << 31, (1 << 63) - 1, (1 << 64) - 1))
PARTS = st.lists(
    NUMBERS.map(lambda n: struct.pack("<Q", n))
    | st.integers(0, 14).map(lambda n: struct.pack("<I", n))
    | st.sampled_from((b"general.alignment", b"general.architecture", b"llama"))
    | st.sampled_from((b"llama.block_count", b"llama.attention.head_count_kv"))
    | st.binary(max_size=12),
    max_size=30,
).map(b"".join)


@repeatable
@given(st.sampled_from((b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0", b"GGUF", b"")), PARTS)
def test_any_model_file_is_inspected_or_refused(tmp_path: Path, head: bytes, rest: bytes) -> None:
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(head + rest)
    identity = FileIdentity(str(path), 1, 1, len(head + rest), hash(rest))
    gguf_file.header.cache_clear()
    with contextlib.suppress(InvalidModel):
        assert isinstance(gguf_file.inspect(identity), str | None)
        assert isinstance(hyperparameters(identity), Hyperparameters)


# ------------------------------------------------------------------------------- command lines


@repeatable
@given(
    st.lists(
        st.sampled_from(("--", "-", "--port", "--port=1", "-m", "--json", "model", "--top-k", "5"))
        | st.text(max_size=6)
    )
)
def test_every_word_of_a_command_line_is_ours_or_the_servers(words: list[str]) -> None:
    """In order, none lost or given to both; only the first `--` is removed."""
    ours, theirs = split(words, {"--port": True, "-m": True, "--json": False})
    left = list(words)
    if "--" in words and len(ours) + len(theirs) < len(words):
        left.remove("--")
    assert sorted(ours + theirs) == sorted(left)
    for side in (ours, theirs):
        rest = iter(left)
        assert all(word in rest for word in side)


# -------------------------------------------------------------------------------------- events


@repeatable
@given(st.lists(st.sampled_from(("append", "read", "follow", "leave")), max_size=60))
def test_each_reader_of_the_event_log_sees_every_event_once(actions: list[str]) -> None:
    """And a reader that has left is forgotten."""
    log, positions, leaving, seen = EventLog(), [0], [], [0]
    for action in actions:
        if action == "append":
            log.append("transition", {})
        elif action == "follow":
            leaving.append(log.subscribe(lambda: None))
            positions.append(log.last_id)
            seen.append(log.last_id)
        elif action == "leave" and leaving:
            leaving.pop()()
        for reader in range(len(positions)):
            batch = log.since(positions[reader])
            assert [e.id for e in batch] == list(range(positions[reader] + 1, log.last_id + 1))
            positions[reader] = log.last_id
    assert len(log._wakers) == len(leaving)
    assert len(log._events) <= events.MAX_EVENTS
