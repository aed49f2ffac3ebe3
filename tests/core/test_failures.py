"""Classification of start failures, with output that the real llama-server printed (build 11434).

Output of accelerators is quoted from the sources of their backends and from public issues.
"""

from __future__ import annotations

import re
import signal
import sys

import pytest

from orchestrator.server.failures import CAUSES, CONSEQUENCES, explain
from orchestrator.server.ladder import KILL
from tests.kit.sentences import assert_sentence

E = "0.00.006.473 E "
FIRST = (
    "0.00.001.916 I srv  llama_server: initializing ...",
    "0.00.004.533 W srv  llama_server: security: no API key is set and CORS allows all origins",
    "0.00.006.562 I srv    load_model: loading model 'm.gguf'",
)
NO_MODEL = (
    f"{E}llama_model_load_from_file_impl: failed to load model",
    f"{E}common_fit_params: encountered an error while trying to fit params to free device memory",
    f"{E}cmn  common_init_: failed to load model 'm.gguf'",
    f"{E}srv  llama_server: exiting due to model loading error",
)
NO_CONTEXT = (
    f"{E}cmn  common_init_: failed to create context with model 'm.gguf'",
    f"{E}srv    load_model: failed to create_context with model 'm.gguf'",
    "0.00.009.611 I srv    operator(): operator(): cleaning up before exit...",
    f"{E}srv  llama_server: exiting due to model loading error",
)
NO_PROJECTOR = (
    f"{E}mtmd_init_from_file: error: Failed to load CLIP model from p.gguf",
    f"{E}srv    load_model: failed to load multimodal model, 'p.gguf'",
    f"{E}srv  llama_server: exiting due to model loading error",
)
NO_DRAFT = (
    f"{E}llama_model_load_from_file_impl: failed to load model",
    f"{E}srv    load_model: failed to load draft model, 'd.gguf'",
    f"{E}srv  llama_server: exiting due to model loading error",
)
USAGE = (
    "",
    "usage:",
    "-c,    --ctx-size N                     size of the prompt context (default: 0)",
    "                                        (env: LLAMA_ARG_CTX_SIZE)",
    "to show complete usage, run with -h",
)
SUCCESS = (
    *FIRST,
    f"{E}gguf_init_from_file: failed to open GGUF file 'cv' (No such file or directory)",
    f"{E}cmn  common_contr: no valid control vector files passed",
    f"{E}srv    load_model: failed to initialize speculative decoding context",
    "0.00.018.957 I srv  llama_server: model loaded",
    "0.00.018.982 I srv  llama_server: listening on http://127.0.0.1:38895",
)
"""The output of a successful start, with all the errors it may print."""

BAD = 'error while handling argument "'
BOUNDS = "data is not within the file bounds, model is corrupted or incomplete"
KEY = "llama_model_load: error loading model: "
READER = "gguf_init_from_reader: "
CACHE = "llama_init_from_model: quantized V cache requires flash_attn to be enabled"
CONTEXT = "llama_init_from_model: failed to initialize the context: "
OPEN = "gguf_init_from_file: failed to open GGUF file"
CLIP = "clip_init: failed to load model 'p.gguf': "
REMOVED = "the argument has been removed. use --spec-draft-n-max or --spec-ngram-mod-n-max"
LIBRARY = "libllama.so: cannot open shared object file: No such file or directory"
ASSERT = "/src/llama-context.cpp:2275: GGML_ASSERT(n_outputs_max <= cparams.n_outputs_max) failed"

# output after the usual first lines, reason, field
REAL: list[tuple[tuple[str, ...], str, str | None]] = [
    # flags
    (("error: invalid argument: --bogus",), "unknown_flag", "llama_server"),
    (("error: invalid argument: --spec-default",), "unknown_flag", "speculative_type"),
    (("error: invalid argument: --ctx-size=4",), "unknown_flag", "max_seq_length"),
    ((f'{BAD}--draft-max": {REMOVED}', *USAGE), "removed_flag", "speculative_type"),
    ((f'{BAD}-c": stoi', *USAGE), "malformed_flag", "max_seq_length"),
    ((f'{BAD}-c": expected value for argument', *USAGE), "malformed_flag", "max_seq_length"),
    ((f'{BAD}-ctk": Unsupported cache type: q9', *USAGE), "malformed_flag", "cache_type_kv"),
    ((f'{BAD}--parallel": error: invalid value for n_parallel',), "malformed_flag", "n_parallel"),
    ((f'{BAD}--spec-type": unknown speculative type: x',), "malformed_flag", "speculative_type"),
    (
        (f"{BAD}--chat-template-file\": error: failed to open file 't.jinja'",),
        "malformed_flag",
        "chat_template_override",
    ),
    ((f'{BAD}--n-cpu-moe": invalid value', *USAGE), "malformed_flag", "llama_server"),
    (
        ('error while handling environment variable "LLAMA_ARG_TOP_K": stoi',),
        "malformed_flag",
        "server_env",
    ),
    # model files
    ((f"{E}{KEY}unknown model architecture: 'x'", *NO_MODEL), "unknown_architecture", "model_path"),
    (
        (
            f"{E}{READER}this GGUF file is version 99 but this software only supports up to 3",
            f"{E}{READER}failed to read header",
            *NO_MODEL,
        ),
        "unknown_architecture",
        "model_path",
    ),
    (
        (f"{E}{KEY}error loading model vocabulary: unknown pre-tokenizer type: 'x'", *NO_MODEL),
        "unknown_architecture",
        "model_path",
    ),
    ((f"{E}{KEY}tensor 'output.weight' {BOUNDS}", *NO_MODEL), "corrupt_model", "model_path"),
    (
        (f"{E}{KEY}check_tensor_dims: tensor 'blk.1.ffn_up.weight' not found", *NO_MODEL),
        "corrupt_model",
        "model_path",
    ),
    (
        (f"{E}{KEY}done_getting_tensors: wrong number of tensors; expected 22, got 21", *NO_MODEL),
        "corrupt_model",
        "model_path",
    ),
    (
        (
            f"{E}{KEY}error loading model hyperparameters: key not found in model: llama.x",
            *NO_MODEL,
        ),
        "corrupt_model",
        "model_path",
    ),
    (
        (f"{E}{READER}invalid magic characters: '<htm', expected 'GGUF'", *NO_MODEL),
        "corrupt_model",
        "model_path",
    ),
    ((f"{E}{READER}failed to read key-value pairs", *NO_MODEL), "corrupt_model", "model_path"),
    ((f"{E}{READER}failed to read header", *NO_MODEL), "corrupt_model", "model_path"),
    (
        (
            f"{E}{OPEN} 'm.gguf' (Permission denied)",
            *NO_MODEL,
        ),
        "permission",
        "model_path",
    ),
    # projectors, drafts, adapters
    (
        (
            f"{E}mtmd_init_from_file: error: mismatch between text model (n_embd = 64) and mmproj",
            "hint: you may be using wrong mmproj",
            *NO_PROJECTOR[1:],
        ),
        "projector_mismatch",
        "mmproj_path",
    ),
    (NO_PROJECTOR, "projector_mismatch", "mmproj_path"),
    (
        (f"{E}{CLIP}load_hparams: unknown projector type: x", *NO_PROJECTOR),
        "unknown_architecture",
        "mmproj_path",
    ),
    (
        (f"{E}{CLIP}load_tensors: failed to seek for tensor mm.2.bias", *NO_PROJECTOR),
        "corrupt_model",
        "mmproj_path",
    ),
    (
        (
            f"{E}{OPEN} 'p.gguf' (Permission denied)",
            *NO_PROJECTOR,
        ),
        "permission",
        "mmproj_path",
    ),
    (
        (
            f"{E}allocating 900.00 MiB on device 0: cudaMalloc failed: out of memory",
            *NO_PROJECTOR,
        ),
        "out_of_memory",
        None,
    ),
    (
        (
            f"{E}{OPEN} 'd.gguf' (No such file or directory)",
            *NO_DRAFT,
        ),
        "file_missing",
        "llama_extra_args",
    ),
    (
        (f"{E}{KEY}unknown model architecture: 'x'", *NO_DRAFT),
        "unknown_architecture",
        "llama_extra_args",
    ),
    (NO_DRAFT, "draft_failed", "llama_extra_args"),
    (
        (f"{E}cmn  common_init_: failed to load lora adapter 'l.gguf'", *NO_CONTEXT),
        "adapter_failed",
        "llama_extra_args",
    ),
    # settings that do not go together
    ((f"{E}{CACHE}", *NO_CONTEXT), "needs_flash_attention", "cache_type_kv"),
    (
        (f"{E}llama_init_from_model: V cache quantization requires flash_attn", *NO_CONTEXT),
        "needs_flash_attention",
        "cache_type_kv",
    ),
    (
        (
            f"{E}common_speculative_init_result: failed to create MTP context",
            f"{E}srv  llama_server: exiting due to model loading error",
        ),
        "speculative_unsupported",
        "speculative_type",
    ),
    (NO_CONTEXT, "context_failed", "max_seq_length"),
    # templates
    (
        (
            "error: the supplied chat template is not supported: {% if %}",
            f"{E}common_chat_templates_init: error: Unexpected token: %}} of type 9",
            f"{E}common_chat_templates_init: failed to initialize chat template",
            f"{E}common_chat_verify_template: failed to apply template: std::exception",
        ),
        "bad_template",
        "chat_template_override",
    ),
    (
        (
            f"{E}srv          init: init: chat template parsing error: Unable to generate parser",
            "While executing CallExpression at line 1, column 19 in source:",
            "...{{ raise_exception('no way') }}...",
            "Error: Jinja Exception: no way",
        ),
        "bad_template",
        "chat_template_override",
    ),
    (
        (
            "error: the supplied chat template is not supported: zzz",
            "note: llama.cpp was started without --jinja, we only support commonly used templates",
        ),
        "bad_template",
        "chat_template_override",
    ),
    # the program
    (
        (f"llama-server: error while loading shared libraries: {LIBRARY}",),
        "missing_library",
        "llama_server",
    ),
    (
        ("llama-server: symbol lookup error: libggml.so.0: undefined symbol: ggml_cpu_reg",),
        "missing_library",
        "llama_server",
    ),
    (
        ("llama-server: /lib/libc.so.6: version `GLIBC_2.38' not found (required by it)",),
        "missing_library",
        "llama_server",
    ),
    (
        (f"{E}llama_model_load_from_file_impl: no backends are loaded. hint: use ggml_load()",),
        "missing_library",
        "llama_server",
    ),
    (
        (f"{E}srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8",),
        "port_in_use",
        None,
    ),
    (
        (ASSERT, "[New LWP 12713]", "#2  0x1 in ggml_abort () from libggml-base.so.0"),
        "crashed",
        None,
    ),
    (
        ("terminate called after throwing an instance of 'std::runtime_error'", "  what():  oh no"),
        "crashed",
        None,
    ),
    (
        (
            "gdb: error while loading shared libraries: libicudata.so.72: failed to map segment",
            "terminate called after throwing an instance of 'std::system_error'",
            "  what():  Resource temporarily unavailable",
        ),
        "resource_limit",
        None,
    ),
    # memory of the host
    ((f"{E}{CONTEXT}std::bad_alloc", *NO_CONTEXT), "out_of_memory", "max_seq_length"),
    (
        (
            f"{E}ggml_aligned_malloc: insufficient memory (attempted to allocate 8192.00 MB)",
            f"{E}ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 858",
            f"{E}{CONTEXT}failed to allocate buffer for kv cache",
            *NO_CONTEXT,
        ),
        "out_of_memory",
        "max_seq_length",
    ),
    (("llama_mmap: mmap failed: Cannot allocate memory",), "out_of_memory", None),
    (("terminate called after throwing", "  what():  std::bad_alloc"), "out_of_memory", None),
]

ACCELERATORS = {
    ("out_of_memory", None): """
        alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory
        alloc_tensor_range: failed to allocate CUDA0 buffer of size 437944320
        error loading model: unable to allocate CUDA0 buffer
        CUDA error: out of memory
        CUDA error: CUBLAS_STATUS_ALLOC_FAILED
        ggml_gallocr_reserve_n: failed to allocate ROCm0 buffer of size 18035509504
        ROCm error: out of memory
        hipErrorOutOfMemory
        error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)
        ggml_metal_add_buffer: error: failed to allocate 'data' buffer, size = 19283.21 MiB
        ggml_metal_add_buffer: buffer 'data' size 18300780544 is larger than buffer maximum of 1717
        ggml_vulkan: Device memory allocation of size 369827840 failed.
        ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory
        ggml_vulkan: Requested buffer size exceeds device buffer size limit: ErrorOutOfDeviceMemory
        ggml_vulkan: Requested buffer size exceeds device memory allocation limit
        can't allocate 2303168640 Bytes of memory on device
        level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)
        Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)
        UR_RESULT_ERROR_OUT_OF_RESOURCES
    """,
    ("out_of_memory", "max_seq_length"): """
        llama_kv_cache_init: failed to allocate buffer for kv cache
        graph_reserve: failed to allocate compute buffers
        llama_new_context_with_model: failed to allocate compute buffers
        llama_init_from_model: failed to initialize the context: failed to allocate buffers
    """,
    ("unusable_gpu", "llama_server"): """
        CUDA error: no kernel image is available for execution on the device
        CUDA error: CUDA driver version is insufficient for CUDA runtime version
        ROCm error: invalid device function
        ROCm error: device kernel image is invalid
        ggml_metal_graph_compute: command buffer 3 failed with status 5
        what():  vk::Device::waitForFences: ErrorDeviceLost
    """,
}
"""Reason and field -> a failure a line: CUDA, ROCm, Metal, Vulkan, SYCL."""

ALL = [
    *REAL,
    *(
        ((line.strip(),), reason, field)
        for (reason, field), lines in ACCELERATORS.items()
        for line in lines.strip().splitlines()
    ),
]

HARMLESS = [
    "ggml_cuda_host_malloc: failed to allocate 1900.00 MiB of pinned memory: out of memory",
    "ggml_vulkan: Failed to allocate pinned memory (vk::Device::allocateMemory: OutOfDeviceMemory)",
    "warning: failed to mlock 123456-byte buffer: Cannot allocate memory",
    "WARNING: failed to allocate 1024.00 MB of pinned memory: out of memory",
    "0.01.2 W set_process_: failed to set process priority 2 : Permission denied (13)",
    "0.00.022.275 W common_fit_params: failed to fit params to free device memory: out of memory",
    "llama_model_loader: - kv 24: general.description str = unknown model architecture: 'x'",
    "0.00.005.137 I llama_model_loader: - kv 1: general.name str = error: invalid argument: --x",
    "ggml_backend_load_best: failed to load libggml-cuda.so: libcuda.so.1: cannot open shared",
    "WARN [ load_model] out of memory | tid=1",
]


def named(value: object) -> str | None:
    return value[0][:50] if isinstance(value, tuple) and value else None


@pytest.mark.parametrize(("lines", "reason", "field"), ALL, ids=named)
def test_real_output_is_classified(lines: tuple[str, ...], reason: str, field: str | None) -> None:
    """The exit status is 1 in all of these cases."""
    tail = (*FIRST, *lines)
    problem = explain(1, tail)
    assert (problem.category, problem.reason, problem.field) == (
        "server_start_failed",
        reason,
        field,
    )
    assert problem.log_tail == tail


@pytest.mark.parametrize(("lines", "reason", "field"), ALL, ids=named)
def test_every_message_names_the_field_and_the_remedy(
    lines: tuple[str, ...], reason: str, field: str | None
) -> None:
    message = explain(1, lines).message
    assert ": " in message
    assert field is None or field in message
    assert "\n" not in message
    assert not any(gibberish in message for gibberish in ("stoi", "stof", "{", "std::exception"))


@pytest.mark.parametrize(("lines", "reason", "field"), ALL, ids=named)
def test_warnings_of_a_successful_start_are_ignored(
    lines: tuple[str, ...], reason: str, field: str | None
) -> None:
    """The server continues without control vectors, pinned memory or locked memory."""
    for before in (SUCCESS, HARMLESS):
        problem = explain(1, (*before, *lines))
        assert (problem.reason, problem.field) == (reason, field)


@pytest.mark.parametrize("before", [SUCCESS, *HARMLESS], ids=lambda value: value[-1][:40])
def test_an_unknown_error_is_quoted_after_harmless_lines(before: tuple[str, ...] | str) -> None:
    lines = before if isinstance(before, tuple) else (before,)
    problem = explain(1, (*lines, "error: the flux capacitor is empty", "exiting due to an error"))
    assert problem.reason == "exited"
    assert "the flux capacitor is empty" in problem.message


def test_every_row_matches_some_real_output() -> None:
    """No row is untested, or hidden by an earlier one."""
    matched = set()
    for lines, _, _ in ALL:
        message = explain(1, lines).message
        matched |= {
            cause
            for cause in (*CAUSES, *CONSEQUENCES)
            if any(re.search(cause.pattern, line, re.IGNORECASE) for line in lines)
            and message.startswith(cause.advice.partition("{")[0])
        }
    assert [c.pattern for c in (*CAUSES, *CONSEQUENCES) if c not in matched] == []


@pytest.mark.parametrize(
    ("printed", "given"),
    [
        ("error: invalid argument: --bogus", "--bogus"),
        ("error: invalid argument: --bogus", "--bogus=3"),
        ("error: invalid argument: --bogus=3", "--bogus=3"),
        ("error: invalid argument: --no_such", "--no-such"),
        ("error: invalid argument: stray", "stray"),
        (f'{BAD}--top-k": stoi', "--top-k"),
        (f'{BAD}--top-k": stoi', "--top_k"),
        (f'{BAD}--draft-max": {REMOVED}', "--draft-max"),
        (f'{BAD}-c": stoi', "-c"),
        (f"{E}{CACHE}", "-fa"),
        (f"{E}{CACHE}", "--cache-type-v"),
        (f"{E}{CONTEXT}std::bad_alloc", "-c"),
        (f"{E}{CONTEXT}std::bad_alloc", "--ubatch-size"),
        ("error: the supplied chat template is not supported: zzz", "--chat-template"),
        (f"{E}srv    load_model: failed to create MTP context", "--spec-type"),
    ],
)
def test_a_flag_in_the_extra_args_is_blamed_on_the_caller(printed: str, given: str) -> None:
    """In any spelling."""
    ours, theirs = explain(1, (printed,)), explain(1, (printed,), (given, "9"))
    assert ours.field != "llama_extra_args"
    assert theirs.field == "llama_extra_args"
    assert "llama_extra_args" in theirs.message
    assert theirs.reason == ours.reason


@pytest.mark.parametrize(
    ("returncode", "reason", "field"),
    [
        (-KILL, "killed", None),
        (128 + KILL, "killed", None),
        (-signal.SIGTERM, "killed", None),
        (-signal.SIGILL, "wrong_cpu", "llama_server"),
        (128 + signal.SIGILL, "wrong_cpu", "llama_server"),
        (-signal.SIGSEGV, "crashed", "llama_server"),
        (128 + signal.SIGABRT, "crashed", "llama_server"),
        *([] if sys.platform == "win32" else [(-signal.SIGBUS, "crashed", "model_path")]),
        (-63, "crashed", None),
        (0xC0000005, "crashed", "llama_server"),
        (0xC000001D, "wrong_cpu", "llama_server"),
        (0xC000013A, "killed", None),
        (0xC0000135, "missing_library", "llama_server"),
        (127, "not_executable", "llama_server"),
        (126, "not_executable", "llama_server"),
        (7, "exited", None),
        (0, "exited", None),
        (255, "exited", None),
        (None, "exited", None),
    ],
)
def test_an_exit_without_output_is_classified_by_its_status(
    returncode: int | None, reason: str, field: str | None
) -> None:
    """A shell adds 128 to the number of a signal."""
    problem = explain(returncode, ())
    assert (problem.reason, problem.field) == (reason, field)


@pytest.mark.parametrize(("signum", "reason"), [(KILL, "killed"), (signal.SIGILL, "wrong_cpu")])
def test_output_before_a_kill_is_not_blamed(signum: int, reason: str) -> None:
    """SIGKILL comes from outside, SIGILL from the CPU."""
    tail = (f"{E}gguf_init_from_file: failed to open GGUF file 'cv' (No such file or directory)",)
    assert explain(-signum, tail).reason == reason
    assert explain(1, tail).reason == "file_missing"


def test_output_explains_a_crash() -> None:
    """An allocation that fails in a driver ends with SIGSEGV or SIGABRT."""
    for signum in (signal.SIGSEGV, signal.SIGABRT):
        assert explain(-signum, ("CUDA error: out of memory",)).reason == "out_of_memory"
        assert explain(-signum, (ASSERT,)).message.count("n_outputs_max <=") == 1


def test_unknown_output_is_quoted_by_its_last_error_line() -> None:
    problem = explain(3, ("fine", "error: a new kind of trouble", "bye"))
    assert problem.reason == "exited"
    assert "error: a new kind of trouble" in problem.message


def test_output_without_an_error_line_is_quoted_by_its_last_line() -> None:
    assert "so long" in explain(3, ("fine", "so long")).message
    assert "initializing" in explain(3, FIRST[:1]).message


def test_braces_in_the_output_do_not_break_the_message() -> None:
    line = 'error while handling argument "--x": {oops} {0}'
    assert "{oops} {0}" in explain(1, (line,)).message


def test_the_length_of_a_message_is_bounded() -> None:
    assert len(explain(1, (f'{BAD}--x": {"y" * 8000}',)).message) < 500


@pytest.mark.parametrize(
    ("key", "returncode", "tail"),
    [
        ("start.status_unknown", None, ()),
        ("start.status_0", 0, ()),
        ("start.empty_line", 1, ("",)),
        ("start.status_128", 128, ("Failed: x",)),
        ("start.signal", -signal.SIGUSR1, ()),
        ("start.signal_without_name", -63, ()),
        ("start.no_such_signal", -200, ()),
        ("start.status_126", 126, ()),
        ("start.access_violation", 0xC0000005, ()),
        ("start.no_dll", 0xC0000135, ()),
        ("start.killed", -KILL, ()),
        ("start.terminated", -signal.SIGTERM, ()),
        ("start.wrong_cpu", -signal.SIGILL, ()),
        ("start.crashed", -signal.SIGSEGV, ()),
        ("start.shrunk", -signal.SIGBUS, ()),
        ("start.not_an_integer", 1, (f'{BAD}-c": stoi',)),
        ("start.not_a_long_integer", 1, (f'{BAD}-c": stoll',)),
        ("start.not_a_number", 1, (f'{BAD}--temp": stof',)),
        ("start.not_a_double", 1, (f'{BAD}--temp": stod',)),
        ("start.missing_library", 1, ("error loading shared library libfoo.so: no",)),
        ("start.damaged", 1, (f"{E}{BOUNDS}",)),
        ("start.assertion", 1, (ASSERT,)),
    ],
)
def test_the_message_is_one_sentence_with_a_remedy(
    key: str, returncode: int | None, tail: tuple[str, ...]
) -> None:
    assert_sentence(key, explain(returncode, tail).message)


def test_exit_statuses_up_to_128_are_not_signals() -> None:
    """A shell reports signals from 129 on, which is SIGHUP."""
    assert explain(128, ()).reason == "exited"
    assert explain(1, ()).reason == "exited"
    assert explain(128 + KILL, ()).reason == "killed"


def test_only_lines_after_the_last_start_count() -> None:
    """A server may fail after it was ready, and then errors of the start are irrelevant."""
    announced = SUCCESS[-1]
    old, new = f"{E}{BOUNDS}", "error: a new kind of trouble"
    assert explain(1, (old, announced, new)).reason == "exited"
    assert new in explain(1, (old, announced, new)).message
    assert explain(1, (old, announced)).reason == "exited"


def test_error_lines_are_found_in_any_case() -> None:
    """And quoted rather than the last line."""
    for complaint in ("ERROR: it broke", "it FAILED", "an error", "it failed"):
        assert complaint in explain(3, ("hello", complaint, "bye")).message
