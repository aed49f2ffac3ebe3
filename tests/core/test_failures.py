"""Every start failure says why: texts as the real llama-server printed them (build 11434)."""

from __future__ import annotations

import signal

import pytest

from orchestrator.failures import explain

REMOVED = "the argument has been removed. use --spec-draft-n-max or --spec-ngram-mod-n-max"
BOUNDS = (
    "tensor 'output.weight' data is not within the file bounds, model is corrupted or incomplete"
)
LIBRARY = "libllama.so: cannot open shared object file: No such file or directory"
VULKAN = "ggml_vulkan: Device memory allocation failed: vk::Device::allocateMemory: "

REAL = [
    ("error: invalid argument: --bogus", "unknown_flag", None),
    (f'error while handling argument "--draft-max": {REMOVED}', "removed_flag", None),
    ('error while handling argument "-c": stoi', "malformed_flag", None),
    ('error while handling argument "-c": expected value for argument', "malformed_flag", None),
    ('error while handling argument "-ctk": Unsupported cache type: q9', "malformed_flag", None),
    ("E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1", "port_in_use", None),
    ("error loading model: unknown model architecture: 'x'", "unknown_architecture", "model_path"),
    (f"E llama_model_load: error loading model: {BOUNDS}", "corrupt_model", "model_path"),
    ("error: Failed to load CLIP model from /m.gguf", "projector_mismatch", "mmproj_path"),
    (
        "error: the supplied chat template is not supported: {% if %}",
        "bad_template",
        "chat_template_override",
    ),
    (f"error while loading shared libraries: {LIBRARY}", "missing_library", "llama_server"),
    ("alloc_buffer: cudaMalloc failed: out of memory", "out_of_memory", None),
    (f"{VULKAN}ErrorOutOfDeviceMemory", "out_of_memory", None),
]


@pytest.mark.parametrize(("line", "reason", "field"), REAL)
def test_real_output_is_classified(line: str, reason: str, field: str | None) -> None:
    """The same exit status 1 has a dozen meanings; only the output tells them apart."""
    tail = ("0.00.001 I srv  llama_server: initializing ...", line, "exiting due to an error")
    problem = explain(1, tail)
    assert (problem.category, problem.reason, problem.field) == (
        "server_start_failed",
        reason,
        field,
    )
    assert problem.log_tail == tail


def test_flag_of_the_caller_is_blamed_on_the_caller() -> None:
    """A flag of ours and a flag of theirs need different people."""
    tail = ("error: invalid argument: --bogus",)
    ours, theirs = explain(1, tail), explain(1, tail, ("--bogus=3",))
    assert ours.field is None
    assert theirs.field == "llama_extra_args"
    assert "--bogus" in theirs.message


@pytest.mark.parametrize(
    ("returncode", "reason"),
    [
        (-signal.SIGKILL, "killed"),
        (128 + signal.SIGKILL, "killed"),
        (-signal.SIGILL, "wrong_cpu"),
        (-signal.SIGSEGV, "crashed"),
        (-signal.SIGUSR1, "crashed"),
        (-63, "crashed"),
        (7, "exited"),
        (None, "exited"),
    ],
)
def test_silent_end_is_told_by_its_status(returncode: int | None, reason: str) -> None:
    """A server that says nothing still ended somehow."""
    assert explain(returncode, ()).reason == reason


def test_unknown_output_keeps_its_last_error_line() -> None:
    """What no row knows is quoted, never summarised away."""
    problem = explain(3, ("fine", "error: a new kind of trouble", "bye"))
    assert problem.reason == "exited"
    assert "error: a new kind of trouble" in problem.message


def test_braces_in_the_output_do_not_break_the_sentence() -> None:
    """Output is data, never a format string."""
    line = 'error while handling argument "--x": {oops} {0}'
    assert "{oops} {0}" in explain(1, (line,)).message
