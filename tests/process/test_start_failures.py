"""Start failures of the real llama-server: the classified reason and the field to change.

Failures that need special hardware are in tests/core/test_failures.py. A script in front of the
server damages files and sets limits, after the checks that refuse a load without a start.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from orchestrator import Orchestrator, State
from orchestrator.demo import tiny_model
from orchestrator.errors import DeadlineExceeded, ServerStartFailed, Stalled
from orchestrator.runtime import look_up
from tests.kit.process.projector import close, write_projector
from tests.kit.process.support import Fake, Make

pytestmark = pytest.mark.external


@pytest.fixture
def silent(llama_server: str, state_dir: Path, tmp_path: Path) -> Iterator[Orchestrator]:
    """An orchestrator over the real server, without its `--help`."""
    script = tmp_path / "no-help"
    server = shlex.quote(llama_server)
    script.write_text(f'#!/bin/sh\n[ "$1" = --help ] && exit 1\nexec {server} "$@"\n')
    script.chmod(0o755)
    with Orchestrator(llama_server=str(script), state_dir=state_dir) as orch:
        yield orch


def failure(orch: Orchestrator, model: str | Path, **fields: Any) -> ServerStartFailed:
    """Return the error of a load: one sentence, also in the status, and the slot is empty."""
    with pytest.raises(ServerStartFailed) as failed:
        orch.load(str(model), **fields)
    error = failed.value
    assert error.field is None or error.field in error.message
    assert "\n" not in error.message
    assert orch.status().state is State.IDLE
    last = orch.status().last_error
    assert last is not None
    assert (last.reason, last.field, last.log_tail) == (error.reason, error.field, error.log_tail)
    return error


# Flags of the caller


@pytest.mark.parametrize(
    ("args", "reason", "contained"),
    [
        (["--bogus"], "unknown_flag", "--bogus"),
        (["--top-k=4"], "unknown_flag", "--top-k=VALUE"),
        (["stray"], "unknown_flag", "stray"),
        (["--draft-max", "8"], "removed_flag", "--spec-draft-n-max"),
        (["--top-k", "abc"], "malformed_flag", "--top-k"),
        (["--top_k", "abc"], "malformed_flag", "--top-k"),
        (["--temp", "hot"], "malformed_flag", "--temp"),
        (["-ngl", "x"], "malformed_flag", "-ngl"),
        (["--n-cpu-moe", "x"], "malformed_flag", "--n-cpu-moe"),
        (["-c", "99999999999"], "malformed_flag", "-c"),
        (["--flash-attn", "maybe"], "malformed_flag", "'maybe'"),
        (["--seed", "1", "--top-k"], "malformed_flag", "expected value"),
        (["-dev", "nonexistent"], "malformed_flag", "invalid device: nonexistent"),
        (["--override-kv", "x"], "malformed_flag", "--override-kv"),
        (["--json-schema", "{"], "malformed_flag", "parse error"),
        (["--grammar-file", "nope"], "malformed_flag", "failed to open"),
        (["-ctk", "q9"], "malformed_flag", "Unsupported cache type: q9"),
        (["-fa", "off", "-ctv", "q4_0"], "needs_flash_attention", "cache_type_kv"),
        (
            ["--spec-type", "draft-mtp"],
            "speculative_unsupported",
            "speculative_type",
        ),
        (["--chat-template", "{% foo %}"], "bad_template", "chat_template_override"),
        (["--no-jinja", "--chat-template", "nonsense"], "bad_template", "chat_template_override"),
        (["-md", "nope.gguf"], "file_missing", "draft model file"),
        (["--lora", "nope.gguf"], "file_missing", "LoRA adapter file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_of_the_caller_is_blamed_by_name(
    silent: Orchestrator,
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    reason: str,
    contained: str,
) -> None:
    """Where the binary does not list its flags, or a file goes away, only its start tells."""
    monkeypatch.setattr(look_up, "check_named_files", lambda _: None)
    error = failure(silent, tiny_model, llama_extra_args=args)
    assert (error.reason, error.field) == (reason, "llama_extra_args")
    assert contained in error.message


def test_failures_of_the_embedded_server_are_classified_too(
    state_dir: Path, tiny_model: str
) -> None:
    """Both its refusals of flags and the errors of the library."""
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        error = failure(orch, tiny_model, llama_extra_args=["--seed", "bogus"])
        assert (error.reason, error.field) == ("malformed_flag", "llama_extra_args")
        error = failure(orch, tiny_model, llama_extra_args=[], chat_template_override="{% foo %}")
        assert (error.reason, error.field) == ("bad_template", "chat_template_override")


# Settings


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template_override": "{% foo %}"}, "bad_template"),
        ({"chat_template_override": "{{ messages | nosuch }}"}, "bad_template"),
        ({"chat_template_override": "{{ raise_exception('no way') }}"}, "bad_template"),
        ({"chat_template_override": "{% foo %}" + "\n" * 400}, "bad_template"),
        ({"speculative_type": "draft-mtp"}, "speculative_unsupported"),
        ({"cache_type_kv": "q4_0", "llama_extra_args": ["-fa", "off"]}, "needs_flash_attention"),
    ],
    ids=lambda value: str(value)[:45],
)
def test_a_setting_the_server_refuses_is_blamed_by_name(
    real: Orchestrator, tiny_model: str, fields: dict[str, Any], reason: str
) -> None:
    """By the field, unless a flag in the extra args causes the failure."""
    error = failure(real, tiny_model, **fields)
    blamed = "llama_extra_args" if "llama_extra_args" in fields else next(iter(fields))
    assert (error.reason, error.field) == (reason, blamed)


# Models


def broken(path: Path, **changes: Any) -> Path:
    """Write a tiny model that has a valid header, but that llama.cpp does not accept."""
    tiny_model.write_tiny_model(path)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".tmp"), changes.get("architecture", "llama"))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = changes.get(field.name, field.contents())
            writer.add_key_value(field.name, value, kind, sub)
    for tensor in reader.tensors:
        data = changes.get(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, data)
    for name in changes.get("extra", ()):
        writer.add_tensor(name, numpy.zeros((4, 4), dtype=numpy.float32))
    close(writer)
    return path.with_suffix(".tmp").rename(path)


@pytest.mark.parametrize(
    ("changes", "reason", "field", "contained"),
    [
        ({"architecture": "bogus"}, "unknown_architecture", "model_path", "'bogus'"),
        ({"blk.1.ffn_up.weight": None}, "corrupt_model", "model_path", "model file"),
        (
            {"blk.1.ffn_up.weight": numpy.zeros((64, 64), dtype=numpy.float32)},
            "corrupt_model",
            "model_path",
            "model file",
        ),
        ({"extra": ["blk.9.ffn_up.weight"]}, "corrupt_model", "model_path", "model file"),
        (
            {"tokenizer.chat_template": "{% if %}"},
            "bad_template",
            "chat_template_override",
            "chat_template_override",
        ),
    ],
    ids=["architecture", "no tensor", "shape", "one too many", "template"],
)
def test_a_model_the_server_cannot_use_is_classified(
    real: Orchestrator,
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
    field: str,
    contained: str,
) -> None:
    """The file is complete, so only the server can tell."""
    error = failure(real, broken(tmp_path / "m.gguf", **changes))
    assert (error.reason, error.field) == (reason, field)
    assert contained in error.message


def test_a_matching_projector_is_accepted(
    real: Orchestrator, tiny_model: str, tmp_path: Path
) -> None:
    """Otherwise the tests below could fail for another reason."""
    fits = write_projector(tmp_path / "p.gguf")
    assert real.load(tiny_model, mmproj_path=str(fits)).is_vision


@pytest.mark.parametrize(
    ("make_it", "reason", "contained"),
    [
        (lambda p: write_projector(p, width=96), "projector_mismatch", "projector"),
        (
            lambda p: write_projector(p, kind="bogus"),
            "unknown_architecture",
            "projector's architecture 'bogus'",
        ),
        (lambda p: write_projector(p, whole=False), "corrupt_model", "projector file"),
        (tiny_model.write_tiny_model, "projector_mismatch", "projector"),
    ],
    ids=["width", "kind", "no tensor", "a text model"],
)
def test_an_unusable_projector_is_blamed_instead_of_the_model(
    real: Orchestrator,
    tiny_model: str,
    tmp_path: Path,
    make_it: Callable[[Path], Path],
    reason: str,
    contained: str,
) -> None:
    path = make_it(tmp_path / "p.gguf")
    error = failure(real, tiny_model, mmproj_path=str(path))
    assert (error.reason, error.field) == (reason, "mmproj_path")
    assert contained in error.message


# The machine


Around = Callable[[str], Orchestrator]


@pytest.fixture
def around(llama_server: str, state_dir: Path, tmp_path: Path) -> Iterator[Around]:
    """Make orchestrators over a script that runs a command, which may `exec "$SERVER"`.

    The command can use `$MODEL`, too. For `--help` the script only runs the server.
    """
    made: list[Orchestrator] = []

    def build(command: str) -> Orchestrator:
        script = tmp_path / "llama-server.sh"
        script.write_text(
            f"#!/bin/sh\nSERVER={shlex.quote(llama_server)}\nMODEL=$2\n"
            f'[ "$1" = -m ] || exec "$SERVER" "$@"\n{command}\n'
        )
        script.chmod(0o755)
        made.append(Orchestrator(llama_server=script, state_dir=state_dir))
        return made[-1]

    yield build
    for orch in made:
        orch.close()


GO = 'exec "$SERVER" "$@"'
UNPRIVILEGED = "setpriv --bounding-set=-dac_override,-dac_read_search " if os.geteuid() == 0 else ""


@pytest.mark.parametrize(
    ("command", "reason", "field", "contained"),
    [
        (f'truncate -s -1000 "$MODEL"; {GO}', "corrupt_model", "model_path", "model file"),
        (f'truncate -s 1000 "$MODEL"; {GO}', "corrupt_model", "model_path", "model file"),
        (f'echo "<html>" > "$MODEL"; {GO}', "corrupt_model", "model_path", "model file"),
        (f'rm "$MODEL"; {GO}', "file_missing", "model_path", "model file"),
        (
            f'chmod 000 "$MODEL"; exec {UNPRIVILEGED}"$SERVER" "$@"',
            "permission",
            "model_path",
            "model file",
        ),
        (
            'cp "$SERVER" "$(dirname "$0")/copy"; exec "$(dirname "$0")/copy" "$@"',
            "missing_library",
            "llama_server",
            ".so",
        ),
        ('exec no-such-server "$@"', "not_executable", "llama_server", "with exit status 127"),
        ("kill -ILL $$", "wrong_cpu", "llama_server", "by SIGILL"),
        ("kill -KILL $$", "killed", None, "by SIGKILL"),
        ("sh -c 'kill -KILL $$'; exit $?", "killed", None, "with exit status 137"),
        ("kill -SEGV $$", "crashed", "llama_server", "by SIGSEGV"),
        ("kill -BUS $$", "crashed", "model_path", "by SIGBUS"),
        (f"export LLAMA_ARG_TOP_K=abc; {GO}", "malformed_flag", "server_env", "LLAMA_ARG_TOP_K"),
        (f"{GO} --bogus", "unknown_flag", "llama_server", "--bogus"),
        ("exit 3", "exited", None, "exit status 3"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) and "$" in value else "",
)
def test_failures_caused_by_the_machine_are_classified(
    around: Around, model_a: str, command: str, reason: str, field: str | None, contained: str
) -> None:
    """Such as a damaged file, a missing library or a signal."""
    error = failure(around(command), model_a)
    assert (error.reason, error.field) == (reason, field)
    assert contained in error.message


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"max_seq_length": 1 << 30}, "max_seq_length"),
        ({"max_seq_length": 1 << 24, "n_parallel": 1}, "max_seq_length"),
        ({"llama_extra_args": ["-c", "16777216"]}, "llama_extra_args"),
        (
            {"llama_extra_args": ["-c", "262144", "-ub", "262144", "-b", "262144"]},
            "llama_extra_args",
        ),
    ],
    ids=str,
)
def test_a_context_too_large_for_the_memory_is_blamed(
    around: Around, tiny_model: str, fields: dict[str, Any], blamed: str
) -> None:
    """Or its cache, or its compute buffers: the model alone would have fitted."""
    orch = around(f"ulimit -v 2000000; {GO} -fit off")
    error = failure(orch, tiny_model, **fields)
    assert (error.reason, error.field) == ("out_of_memory", blamed)
    assert "max_seq_length" in error.message


def test_an_abort_is_reported_with_the_assertion_that_failed(
    around: Around, tiny_model: str
) -> None:
    """The assertion is far above the last line, because a debugger prints a backtrace after it."""
    frames = "; ".join(f"echo '#{n}  0x1 in ggml_abort () from libggml.so'" for n in range(90))
    text = "/src/llama-context.cpp:2275: GGML_ASSERT(n_outputs_max <= 4) failed"
    error = failure(around(f"echo '{text}'; {frames}; kill -ABRT $$"), tiny_model)
    assert (error.reason, error.field) == ("crashed", None)
    assert "n_outputs_max <= 4" in error.message


def test_warnings_before_a_successful_start_are_not_blamed(around: Around, tiny_model: str) -> None:

    fake = (
        "echo 'E gguf_init_from_file: failed to open GGUF file (No such file or directory)'; "
        "echo 'I srv  llama_server: listening on http://127.0.0.1:9'; "
        "echo 'error: the flux capacitor is empty'; exit 1"
    )
    error = failure(around(fake), tiny_model)
    assert error.reason == "exited"
    assert "flux capacitor" in error.message


def test_the_log_tail_is_complete_and_redacted(around: Around, tiny_model: str) -> None:
    """It has the first line, no secrets and no colours."""
    printed = r"printf 'first \033[31mred\033[0m\nHF_TOKEN=abcd1234\n\033]0;x\007n_tokens = 512\n'"
    error = failure(around(f"{printed}; exit 1"), tiny_model)
    assert error.log_tail == ("first red", "HF_TOKEN=[redacted]", "n_tokens = 512")


# Time


def test_a_stall_and_a_deadline_are_different_errors(make: Make, fake: Fake, model_a: str) -> None:
    fake.behave(loading_s=-1, work="idle")
    with pytest.raises(Stalled) as stalled:
        make().load(model_a, stall_timeout_s=0.2)
    assert (stalled.value.category, stalled.value.field) == ("stalled", "stall_timeout_s")
    with pytest.raises(DeadlineExceeded) as late:
        make(slot="other").load(model_a, deadline_s=0.3)
    assert late.value.category == "deadline"
