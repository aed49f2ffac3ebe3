"""The server's output: secrets and control sequences are removed, useful text is kept."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.redaction import HIDDEN, redact
from orchestrator.server.output import MAX_LINE_BYTES, MAX_LINES, OutputRing
from tests.kit.labels import label
from tests.kit.timing import fastest_s

S = "Xy9zSecretValue42"


def kept_lines(*pieces: bytes | str) -> tuple[str, ...]:
    """Return the lines that are kept of an output."""
    ring = OutputRing()
    for piece in pieces:
        ring.feed(piece.encode() if isinstance(piece, str) else piece)
    ring.close()
    return ring.tail(MAX_LINES)


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{S}",
        f"<hf_{S}>",
        f"model_hf_{S}",
        f"ghp_{S}",
        f"sk-{S}",
        f"MY_API_KEY='{S}'",
        f"eyJhbGciOiJIUzI1NiJ9.{S}.{S}",
        f"Bearer {S}",
        f"bearer   {S}",
        f"Authorization: Basic {S}==",
        f"authorization={S}",
        f"Proxy-Authorization: Negotiate {S}",
        f'"Authorization": "Bearer {S}"',
        f"X-Auth-Token: {S}",
        f"Cookie: a=b; session={S}",
        f"api_key={S}",
        f"apiKey: {S}",
        f"API key: {S}",
        f'"api_key": "{S}"',
        f"{{'api_key': 'x {S}'}}",
        f'{{\\"api_key\\": \\"{S}\\"}}',
        f"--api-key {S}",
        f"--api-key={S}",
        f"--api_key   {S}",
        f"--api-key first,{S}",
        f'["--api-key", "{S}"]',
        f"-hft {S}",
        f"--hf-token {S}",
        f"AWS_SECRET_ACCESS_KEY={S}",
        f"LLAMA_API_KEY={S};next",
        f"client_secret={S}",
        f"DB_PASSWORD='{S} and {S}'",
        f"password: {S}",
        f"HF_TOKEN={S}",
        f'export HF_TOKEN = "{S}"',
        f"access_token={S}",
        f'"token": "{S}"',
        f"https://user:{S}@host/path",
        f"https://user:p@{S}@host/path",
        f"https://{S}@host/path",
        f"GET /?X-Amz-Signature={S}&a=b",
    ],
)
def test_secret_is_redacted_in_any_syntax(text: str) -> None:
    """In command lines, JSON, headers, URLs and environments, anywhere in the line."""
    for line in (
        text,
        f"0.00.001 I srv  init: {text}",
        f"{text} and so on",
        f"({text}",
        f"x\t{text}",
    ):
        [kept] = kept_lines(line)
        assert S not in kept
        assert HIDDEN in kept
        assert redact(kept) == kept


@pytest.mark.parametrize("name", ["password: ", "secret=", "HF_TOKEN=", "--api-key "])
def test_short_secret_is_redacted_after_a_secret_name(name: str) -> None:
    """A weak key is still a key."""
    assert redact(f"{name}x9yz") == name + HIDDEN


@pytest.mark.parametrize(
    "cut",
    ["\x1b[0m", "\x1b[38;5;214m", "\x1b]0;title\x07", "\x9b31m", "\x00", "\r", "\x1b(B", "\u200b"],
    ids=label,
)
def test_secret_split_by_control_sequences_is_redacted(cut: str) -> None:
    for at in (1, 3, 5, 12):
        text = f"hf_{S}"
        [kept] = kept_lines(f"token {text[:at]}{cut}{text[at:]} here")
        assert kept == f"token hf_{HIDDEN} here"


def test_secret_in_pieces_or_without_a_line_end_is_redacted() -> None:
    """A pipe is read at any byte, and the last line may have no end."""
    assert kept_lines("HF_TO", "KEN=", S[:5], S[5:]) == (f"HF_TOKEN={HIDDEN}",)
    assert kept_lines(f"HF_TOKEN={S}\r\n", "next") == (f"HF_TOKEN={HIDDEN}", "next")


@pytest.mark.parametrize(
    "line",
    [
        "n_tokens = 512",
        "token = 1",
        "tokens per second = 35.2",
        "special_eos_token=2",
        "special_eot_token_id = 128009",
        "tokenizer.ggml.model = gpt2",
        'tokenizer.ggml.tokens arr[str,259] = ["<unk>", "<s>", "</s>"]',
        "tokenizer.ggml.bos_token_id u32 = 128000",
        "tokenizer.chat_template str = {% for message in messages %}",
        "print_info: BOS token        = 0 '<|begin_of_text|>'",
        "print_info: EOG token        = 128001 '<|end_of_text|>'",
        "eos_token = <|im_end|>",
        "token = 1234567890",
        "api_key_file = /etc/llama/keys",
        "eos_token = endoftext",
        '{"bos_token": "<s>", "max_tokens": 100000}',
        "print_info: max token length = 256",
        "load: token to piece cache size = 0.1684 MB",
        "slot update_slots: token: 12345 'hello'",
        "prompt eval time = 12.3 ms / 5 tokens (2.1 ms per token, 476.2 tokens per second)",
        "srv  llama_server: security: no API key is set and CORS allows all origins",
        "--api-key-file /etc/llama/keys",
        "listening on http://127.0.0.1:8080",
        "see https://github.com/ggml-org/llama.cpp/pull/25655 or mail me@example.org",
        "hf_transfer is enabled",
        "risk-assessment of task-specific heads",
        "unauthorized: 401",
        "key = value",
    ],
)
def test_useful_line_is_not_redacted(line: str) -> None:
    """llama.cpp writes of tokens in every other line, and of keys in many."""
    assert kept_lines(line) == (line,)


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (b"\x1b[1m\x1b[38;5;214mPhase 1\x1b[0m", "Phase 1"),
        (b"\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link", "textlink"),
        (b"\x1b]never ends", "never ends"),
        (b"\x1bPdevice\x1b\\text", "text"),
        (b"\x1b(Btext\x1b7\x1bM", "text"),
        ("\x9b31mred\x9d0;t\x9ctext".encode(), "redtext"),
        (b"a\x00b\x07c\x08d\x0be\x7ff\tg", "abcdef\tg"),
        ("a\x85b\u2028c\u2029d".encode(), "abcd"),
        ("\u202egpj.exe\u202c \u2066x\u2069\u200f\ufeff".encode(), "gpj.exe x"),
        (b"10%\r20%\r30%\r", "10%20%30%"),
        (b"caf\xc3\xa9 \xff\xfe \xc3", "caf\u00e9 \ufffd\ufffd \ufffd"),
        ("\u4f60\u597d \U0001f600 \u00e9".encode(), "\u4f60\u597d \U0001f600 \u00e9"),
    ],
    ids=label,
)
def test_control_sequences_are_removed_and_text_is_kept(raw: bytes, kept: str) -> None:
    """A log line must not move the cursor, retitle the window or reverse the text."""
    assert kept_lines(raw) == (kept,)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_no_text_can_control_the_terminal_or_become_two_lines(text: str) -> None:
    for line in kept_lines(text):
        assert len(line.splitlines()) <= 1
        assert not [c for c in line if unicodedata.category(c) == "Cc" and c != "\t"]
        assert not [c for c in line if unicodedata.bidirectional(c) in {"RLO", "LRO", "RLI", "PDF"}]


PIECES = [
    *("a", "a.", "token", "token=", "api_key", "api_key_", " ", "=", "://", "://a:", "://a@", '"'),
    *("hf_", "hf_a", "eyJaaaaaaaa.", "password: ", "bearer ", "--api-key ", "authorization: "),
    *(
        "\\",
        "A_TOKEN=",
        "cookie:",
        "secret='",
        "\x1b[",
        "\x1b]",
        "\x1b[0",
        "\x9b ",
        "\u202e",
        "&key=",
    ),
]


def cpu_s(text: str) -> float:
    """Return the CPU seconds that a line takes at best, whatever else the machine does."""
    ring = OutputRing()
    ring.feed(text.encode() + b"\n")
    [line] = ring.tail()
    assert len(line) <= len(text) * len(HIDDEN)
    return fastest_s(ring.tail, times=7)


@pytest.mark.parametrize("piece", PIECES, ids=label)
def test_redaction_takes_linear_time(piece: str) -> None:
    """Eight times the line takes eight times as long; a quadratic pattern would take 64 times."""
    longest = (piece * MAX_LINE_BYTES)[: MAX_LINE_BYTES // 2]
    assert cpu_s(longest) < 24 * cpu_s(longest[: len(longest) // 8]) + 0.001


def test_whole_ring_of_the_longest_lines_is_redacted() -> None:
    """16 MB of log at once, as `logs(2000)` reads it."""
    ring = OutputRing()
    line = (f"load_model: n_tokens = 5, local path 'm.gguf' HF_TOKEN={S} " * 200).encode()
    ring.feed((line[: MAX_LINE_BYTES - 1] + b"\n") * MAX_LINES)
    kept = ring.tail(MAX_LINES)
    assert len(kept) == MAX_LINES
    assert not [line for line in kept if S in line]


def test_tail_reaches_back_past_a_backtrace() -> None:
    """The reason of an abort precedes the debugger's output about every thread."""
    backtrace = [f"[New LWP {n}]" for n in range(120)]
    ring = OutputRing()
    ring.feed("\n".join(["GGML_ASSERT(x) failed", *backtrace, ""]).encode())
    assert ring.tail()[0] == "GGML_ASSERT(x) failed"


@given(st.text())
def test_redaction_is_idempotent(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_in_any_pieces_become_clean_lines(pieces: list[bytes]) -> None:
    ring = OutputRing()
    for piece in pieces:
        ring.feed(piece)
    ring.close()
    assert ring.unprompted_bytes == sum(map(len, pieces))
    for line in ring.tail(MAX_LINES):
        assert not any(ord(c) < 32 and c != "\t" for c in line)


def test_ring_keeps_the_last_lines_and_bounds_their_length() -> None:
    ring = OutputRing()
    ring.feed(b"".join(b"line %d\n" % n for n in range(3 * MAX_LINES)))
    assert ring.tail(1) == (f"line {3 * MAX_LINES - 1}",)
    assert len(ring.tail(10 * MAX_LINES)) == MAX_LINES
    for _ in range(64):
        ring.feed(b"x" * 65536)
    ring.feed(b"\n")
    assert len(ring.tail(1)[0]) <= 8192


def test_address_is_read_from_a_line_in_pieces() -> None:
    ring = OutputRing()
    for piece in (b"0.1 I srv  llama_server: listen", b"ing on http://127.0.0.1:43", b"210\n"):
        assert ring.announced == ()
        ring.feed(piece)
    assert ring.announced == ("http://127.0.0.1:43210",)
