"""The real llama-server made to fail in every way it can be: the reason, and the field to change.

What only hardware can do is in tests/core/test_failures.py. Files and limits are broken by a script
that stands before the server, after the orchestrator has looked: what it can see for itself it
refuses without a start.
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
from tests.kit.process.support import Fake, Make

pytestmark = pytest.mark.external

EMBEDDING = 64
"""Of the tiny model."""


@pytest.fixture
def real(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    """An orchestrator over the real llama-server."""
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
        yield orch


def failure(orch: Orchestrator, model: str | Path, **fields: Any) -> ServerStartFailed:
    """The error of a load: one sentence, with the output; nothing is left, and all is as before."""
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
    ("args", "reason", "says"),
    [
        (["--bogus"], "unknown_flag", "does not know --bogus"),
        (["--top-k=4"], "unknown_flag", "give the value as the next argument"),
        (["stray"], "unknown_flag", "does not know stray"),
        (["--draft-max", "8"], "removed_flag", "--spec-draft-n-max"),
        (["--top-k", "abc"], "malformed_flag", "--top-k (not a whole number"),
        (["--top_k", "abc"], "malformed_flag", "--top-k (not a whole number"),
        (["--temp", "hot"], "malformed_flag", "--temp (not a number)"),
        (["-ngl", "x"], "malformed_flag", "-ngl"),
        (["--n-cpu-moe", "x"], "malformed_flag", "--n-cpu-moe"),
        (["-c", "99999999999"], "malformed_flag", "-c (not a whole number, or too large)"),
        (["--flash-attn", "maybe"], "malformed_flag", "'maybe'"),
        (["--seed", "1", "--top-k"], "malformed_flag", "expected value"),
        (["-dev", "nonexistent"], "malformed_flag", "invalid device: nonexistent"),
        (["--override-kv", "x"], "malformed_flag", "--override-kv"),
        (["--json-schema", "{"], "malformed_flag", "parse error"),
        (["--grammar-file", "nope"], "malformed_flag", "failed to open"),
        (["-ctk", "q9"], "malformed_flag", "Unsupported cache type: q9"),
        (["-fa", "off", "-ctv", "q4_0"], "needs_flash_attention", "flash attention"),
        (
            ["--spec-type", "draft-mtp"],
            "speculative_unsupported",
            "speculative_type to another type",
        ),
        (["--chat-template", "{% if %}"], "bad_template", "the chat template"),
        (["--no-jinja", "--chat-template", "nonsense"], "bad_template", "the chat template"),
        (["-md", "nope.gguf"], "file_missing", "the draft model file was not found"),
        (["--lora", "nope.gguf"], "file_missing", "the LoRA adapter file was not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_of_the_caller_is_blamed_by_name(
    real: Orchestrator, tiny_model: str, args: list[str], reason: str, says: str
) -> None:
    """They can change it, and nothing else."""
    error = failure(real, tiny_model, llama_extra_args=args)
    assert (error.reason, error.field) == (reason, "llama_extra_args")
    assert says in error.message


def test_failures_of_the_embedded_server_are_classified_too(
    state_dir: Path, tiny_model: str
) -> None:
    """Its own flags, and the library's own errors."""
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        error = failure(orch, tiny_model, llama_extra_args=["--bogus"])
        assert (error.reason, error.field) == ("unknown_flag", "llama_extra_args")
        error = failure(orch, tiny_model, llama_extra_args=[], chat_template_override="{% if %}")
        assert (error.reason, error.field) == ("bad_template", "chat_template_override")


# Settings


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template_override": "{% if %}"}, "bad_template"),
        ({"chat_template_override": "{{ messages"}, "bad_template"),
        ({"chat_template_override": "{{ raise_exception('no way') }}"}, "bad_template"),
        ({"chat_template_override": "{% if %}" + "\n" * 400}, "bad_template"),
        ({"speculative_type": "draft-mtp"}, "speculative_unsupported"),
        ({"cache_type_kv": "q4_0", "llama_extra_args": ["-fa", "off"]}, "needs_flash_attention"),
    ],
    ids=lambda value: str(value)[:45],
)
def test_a_setting_the_server_refuses_is_blamed_by_name(
    real: Orchestrator, tiny_model: str, fields: dict[str, Any], reason: str
) -> None:
    """By the name the caller knows it under, unless a flag of theirs is in its way."""
    error = failure(real, tiny_model, **fields)
    blamed = "llama_extra_args" if "llama_extra_args" in fields else next(iter(fields))
    assert (error.reason, error.field) == (reason, blamed)


# Models


def broken(path: Path, **changes: Any) -> Path:
    """A tiny model whose header is in order, and which is not what llama.cpp expects."""
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


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "reason", "field", "says"),
    [
        ({"architecture": "bogus"}, "unknown_architecture", "model_path", "'bogus'"),
        ({"blk.1.ffn_up.weight": None}, "corrupt_model", "model_path", "download it again"),
        (
            {"blk.1.ffn_up.weight": numpy.zeros((64, 64), dtype=numpy.float32)},
            "corrupt_model",
            "model_path",
            "download it again",
        ),
        ({"extra": ["blk.9.ffn_up.weight"]}, "corrupt_model", "model_path", "download it again"),
        (
            {"tokenizer.chat_template": "{% if %}"},
            "bad_template",
            "chat_template_override",
            "if it is the model's own",
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
    says: str,
) -> None:
    """All of it is there, so that only the server can tell."""
    error = failure(real, broken(tmp_path / "m.gguf", **changes))
    assert (error.reason, error.field) == (reason, field)
    assert says in error.message


def projector(path: Path, *, width: int = EMBEDDING, kind: str = "mlp", whole: bool = True) -> Path:
    """A vision projector of zeros, for a text model of that width."""
    writer = gguf.GGUFWriter(path, "clip")
    for name in ("has_vision_encoder", "has_llava_projector", "use_gelu"):
        writer.add_bool(f"clip.{name}", True)
    writer.add_string("clip.projector_type", kind)
    sizes = {"image_size": 28, "patch_size": 14, "embedding_length": 32, "block_count": 1}
    sizes |= {"feed_forward_length": 64, "projection_dim": width, "attention.head_count": 2}
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (32, 3, 14, 14),
        "v.class_embd": (32,),
        "v.position_embd.weight": (5, 32),
    }
    layers = {f"v.blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
    layers |= {"v.blk.0.ffn_up": (64, 32), "v.blk.0.ffn_down": (32, 64)}
    layers |= {"mm.0": (width, 32), "mm.2": (width, width)}
    for name, square in layers.items():
        shapes |= {f"{name}.weight": square, f"{name}.bias": square[:1]}
    for name in ("v.pre_ln", "v.post_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    for name, shape in shapes.items():
        if whole or not name.startswith("v.blk"):
            writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    close(writer)
    return path


def test_a_matching_projector_is_accepted(
    real: Orchestrator, tiny_model: str, tmp_path: Path
) -> None:
    """So that the ones below fail for what is wrong with them."""
    fits = projector(tmp_path / "p.gguf")
    assert real.load(tiny_model, mmproj_path=str(fits)).is_vision


@pytest.mark.parametrize(
    ("make_it", "reason", "says"),
    [
        (lambda p: projector(p, width=96), "projector_mismatch", "does not fit the model"),
        (lambda p: projector(p, kind="bogus"), "unknown_architecture", "the projector's"),
        (lambda p: projector(p, whole=False), "corrupt_model", "the projector file"),
        (tiny_model.write_tiny_model, "projector_mismatch", "the projector cannot be used"),
    ],
    ids=["width", "kind", "no tensor", "a text model"],
)
def test_an_unusable_projector_is_blamed_instead_of_the_model(
    real: Orchestrator,
    tiny_model: str,
    tmp_path: Path,
    make_it: Callable[[Path], Path],
    reason: str,
    says: str,
) -> None:
    """The same words as for a model, about another file."""
    path = make_it(tmp_path / "p.gguf")
    error = failure(real, tiny_model, mmproj_path=str(path))
    assert (error.reason, error.field) == (reason, "mmproj_path")
    assert says in error.message


# The machine


Around = Callable[[str], Orchestrator]


@pytest.fixture
def around(llama_server: str, state_dir: Path, tmp_path: Path) -> Iterator[Around]:
    """Orchestrators over a script that does something and then becomes the real server.

    It sees `$SERVER` and `$MODEL`; asked for help it is the server and nothing else.
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
    ("command", "reason", "field", "says"),
    [
        (f'truncate -s -1000 "$MODEL"; {GO}', "corrupt_model", "model_path", "download it again"),
        (f'truncate -s 1000 "$MODEL"; {GO}', "corrupt_model", "model_path", "download it again"),
        (f'echo "<html>" > "$MODEL"; {GO}', "corrupt_model", "model_path", "download it again"),
        (f'rm "$MODEL"; {GO}', "file_missing", "model_path", "was not found"),
        (
            f'chmod 000 "$MODEL"; exec {UNPRIVILEGED}"$SERVER" "$@"',
            "permission",
            "model_path",
            "may not read the model file",
        ),
        (
            'cp "$SERVER" "$(dirname "$0")/copy"; exec "$(dirname "$0")/copy" "$@"',
            "missing_library",
            "llama_server",
            ".so is missing",
        ),
        ('exec no-such-server "$@"', "not_executable", "llama_server", "with exit status 127"),
        ("kill -ILL $$", "wrong_cpu", "llama_server", "by SIGILL"),
        ("kill -KILL $$", "killed", None, "by SIGKILL"),
        ("sh -c 'kill -KILL $$'; exit $?", "killed", None, "with exit status 137"),
        ("kill -SEGV $$", "crashed", "llama_server", "by SIGSEGV"),
        ("kill -BUS $$", "crashed", "model_path", "by SIGBUS"),
        (f"export LLAMA_ARG_TOP_K=abc; {GO}", "malformed_flag", "server_env", "LLAMA_ARG_TOP_K"),
        (f"{GO} --bogus", "unknown_flag", "llama_server", "--bogus"),
        ("exit 3", "exited", None, "it printed nothing"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) and "$" in value else "",
)
def test_failures_caused_by_the_machine_are_classified(
    around: Around, model_a: str, command: str, reason: str, field: str | None, says: str
) -> None:
    """A file that changes behind our back, a library that is gone, a signal out of nowhere."""
    error = failure(around(command), model_a)
    assert (error.reason, error.field) == (reason, field)
    assert says in error.message


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
    """The context, its cache or its compute buffers: the model itself would have fitted."""
    orch = around(f"ulimit -v 2000000; {GO} -fit off")
    error = failure(orch, tiny_model, **fields)
    assert (error.reason, error.field) == ("out_of_memory", blamed)
    assert "max_seq_length" in error.message


def test_an_abort_is_reported_with_the_assertion_that_failed(
    around: Around, tiny_model: str
) -> None:
    """Not by what a debugger prints after it: the reason stands far up in the output."""
    frames = "; ".join(f"echo '#{n}  0x1 in ggml_abort () from libggml.so'" for n in range(90))
    text = "/src/llama-context.cpp:2275: GGML_ASSERT(n_outputs_max <= 4) failed"
    error = failure(around(f"echo '{text}'; {frames}; kill -ABRT $$"), tiny_model)
    assert (error.reason, error.field) == ("crashed", None)
    assert "n_outputs_max <= 4" in error.message


def test_warnings_before_a_successful_start_are_not_blamed(around: Around, tiny_model: str) -> None:
    """Everything that a start may complain of, then something new."""
    fake = (
        "echo 'E gguf_init_from_file: failed to open GGUF file (No such file or directory)'; "
        "echo 'I srv  llama_server: listening on http://127.0.0.1:9'; "
        "echo 'error: the flux capacitor is empty'; exit 1"
    )
    error = failure(around(fake), tiny_model)
    assert error.reason == "exited"
    assert "flux capacitor" in error.message


def test_the_log_tail_is_complete_and_redacted(around: Around, tiny_model: str) -> None:
    """In an error, a status and an HTTP answer: no secret, no colour, and the first line too."""
    printed = r"printf 'first \033[31mred\033[0m\nHF_TOKEN=abcd1234\n\033]0;x\007n_tokens = 512\n'"
    error = failure(around(f"{printed}; exit 1"), tiny_model)
    assert error.log_tail == ("first red", "HF_TOKEN=[redacted]", "n_tokens = 512")


# Time


def test_a_stall_and_a_deadline_are_different_errors(make: Make, fake: Fake, model_a: str) -> None:
    """Two limits, two errors; neither is the server's failure."""
    fake.behave(loading_s=-1, work="idle")
    with pytest.raises(Stalled) as stalled:
        make().load(model_a, stall_timeout_s=0.2)
    assert (stalled.value.category, stalled.value.field) == ("stalled", "stall_timeout_s")
    with pytest.raises(DeadlineExceeded) as late:
        make(slot="other").load(model_a, deadline_s=0.3)
    assert late.value.category == "deadline"
