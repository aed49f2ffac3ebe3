"""Why a server did not start: its exit status and output, classified into one sentence.

Pure and driven by tables: llama-server ends almost every failed start with exit status 1, so the
output decides. A line that names a cause wins over one that only follows from it, and a later line
over an earlier one; lines below error level, or from before the server was ready, never decide.
Without a match the last error line is the reason. The patterns were collected by provoking each
failure on llama.cpp build 11434 and, for accelerators, from its sources and issues.
"""

from __future__ import annotations

import itertools
import re
import signal
import sys
from typing import Final, NamedTuple

from orchestrator.errors import Problem
from orchestrator.server import ladder
from orchestrator.settings.fields import SETTINGS
from orchestrator.settings.flags import flag_of

_EXTRA: Final = "llama_extra_args"
_SERVER: Final = "llama_server"


class Cause(NamedTuple):
    """One row: a pattern of the output, and what to report.

    Attributes:
        reason: Stable word for programs.
        field: What to change: a field of the request, `llama_server`, or None. `model_path` stands
            for whichever file could not be loaded.
        pattern: Searched in every line, in any case; a group `flag` is the flag to blame.
        advice: What happened and what to do; may use the groups of the pattern and `subject`.
        flags: Flags to blame if they are in the extra args, besides the field's own.
    """

    reason: str
    field: str | None
    pattern: str
    advice: str
    flags: str = ""


_MEMORY: Final = (
    r"out[ _]?of[ _]?(device|host)?[ _]?(memory|resources)|failed to allocate|unable to allocate|"
    r"can'?t allocate|cannot allocate|bad_alloc|insufficient memory|ALLOC(ATION)?_FAIL|"
    r"memory allocation of size \d+ failed|exceeds device .*limit|larger than buffer maximum"
)
_DAMAGED: Final = "the {subject} file is damaged or incomplete: download it again"

# fmt: off
CAUSES: Final = (
    Cause("missing_library", _SERVER,
        r"error(?: while)? loading shared librar(?:y|ies:) (?P<what>[^:]+)|"
        r"Library not loaded: (?P<macos>\S+)",
        "the shared library {what}{macos} is missing or unusable: reinstall {field}, or set "
        "LD_LIBRARY_PATH"),
    Cause("missing_library", _SERVER,
        r"symbol lookup error|error relocating|undefined symbol|version `\S+' not found|"
        r"no backends are loaded",
        "the binary and its shared libraries are of different versions: reinstall {field}"),
    Cause("removed_flag", None,
        r'handling argument "(?P<flag>-[^"]+)": the argument has been removed\.?(?P<what>.*)',
        "this llama-server has removed {flag}: {what}"),
    Cause("malformed_flag", None,
        r'error while handling argument "(?P<flag>-[^"]+)": (?:error: )?(?P<what>.*)',
        "llama-server refuses {flag} ({what}): correct its value"),
    Cause("malformed_flag", "server_env",
        r'error while handling environment variable "(?P<what>[^"]+)"',
        "llama-server refuses the variable {what}: correct it in {field}"),
    Cause("unknown_flag", None, r"error: invalid argument: (?P<flag>-[^\s=]+)=",
        "this llama-server does not take {flag}=VALUE: give the value as the next argument"),
    Cause("unknown_flag", None, r"error: invalid argument: (?P<flag>\S+)",
        "this llama-server does not know {flag}: remove it, or use a build that has it"),
    Cause("port_in_use", None, r"couldn't bind HTTP server socket|address already in use",
        "the server could not bind its port: try again"),
    Cause("unknown_architecture", "model_path",
        r"unknown (?:model architecture|projector type): '?(?P<what>[^']*)",
        "this llama-server does not know the {subject}'s architecture {what!r}: use a newer build"),
    Cause("unknown_architecture", "model_path",
        r"GGUF file is version \d+ but|unknown (?:pre-tokenizer type|tokenizer)|invalid ggml type",
        "the {subject} has a newer format than this llama-server reads: use a newer build"),
    Cause("corrupt_model", "model_path",
        r"check_tensor_dims|(?:wrong number of|missing) tensors?|unable to find tensor|"
        r"error loading model (?:hyperparameters|vocabulary)",
        "the {subject} file lacks data that this llama-server expects: download it again, or use "
        "the build it was made for"),
    Cause("corrupt_model", "model_path",
        r"not within the file bounds|corrupted or incomplete|invalid magic|invalid gguf|GGUFv1|"
        r"failed to read (?:magic|key-value|tensor)|failed to seek|unexpectedly reached end of file"
        r"|endianness",
        _DAMAGED),
    Cause("permission", "model_path", r"(?:failed to|cannot) open.*permission denied",
        "the server is not allowed to read the {subject} file: change its permissions"),
    Cause("projector_mismatch", "mmproj_path", r"mismatch between text model",
        "the projector does not match the model: choose the one made for it"),
    Cause("bad_template", "chat_template_override",
        r"chat_templates_init: error: (?P<what>.+)|While executing (?P<where>.+) in source|"
        r"^Error: (?P<said>Jinja.+)",
        "the chat template fails ({what}{where}{said}): correct it, or set chat_template_override "
        "if it is the model's own"),
    Cause("needs_flash_attention", "cache_type_kv",
        r"V cache (?:quantization )?requires flash_attn",
        "a quantised V cache needs flash attention: enable it, or set cache_type_kv to f16",
        "-fa --flash-attn"),
    Cause("speculative_unsupported", "speculative_type", r"failed to create MTP context",
        "the model cannot draft in this way: set speculative_type to another type, or to off"),
    Cause("out_of_memory", "max_seq_length",
        rf"(?:kv[_ ]cache|init_from_model|new_context|graph_reserve|create_context).*(?:{_MEMORY})",
        "not enough memory for the context: use a smaller max_seq_length or cache_type_kv",
        "-b --batch-size -ub --ubatch-size"),
    Cause("out_of_memory", None, _MEMORY,
        "not enough memory: use a smaller model or context, or fewer layers on the GPU (-ngl)"),
)

CONSEQUENCES: Final = (
    Cause("file_missing", "model_path", r"failed to open.*no such file",
        "the {subject} file was not found: check its path"),
    Cause("corrupt_model", "model_path", r"failed to read header", _DAMAGED),
    Cause("adapter_failed", _EXTRA, r"failed to (?:load|apply) lora adapter",
        "the LoRA adapter cannot be used: choose one made for this model"),
    Cause("draft_failed", _EXTRA, r"failed to load draft model",
        "the draft model cannot be used: choose another"),
    Cause("projector_mismatch", "mmproj_path", r"failed to load (?:CLIP|multimodal) model",
        "the projector cannot be used: choose the one made for the model"),
    Cause("bad_template", "chat_template_override",
        r"chat template (?:is not supported|parsing error)|"
        r"failed to (?:apply|initialize|parse) (?:chat )?template",
        "the chat template cannot be used: correct it, or set chat_template_override if it is the "
        "model's own"),
    Cause("unusable_gpu", _SERVER,
        r"(?:CUDA|ROCm|HIP|MUSA|SYCL) error|DeviceLost|ggml_metal.*failed with status",
        "this build, this GPU and its driver do not work together: use a build made for them, "
        "update the driver, or set -ngl 0"),
    Cause("resource_limit", None, r"Resource temporarily unavailable|too many open files",
        "a limit on threads or files was reached: raise it (ulimit), or use fewer threads (-t)"),
    Cause("crashed", None, r"what\(\):\s*(?P<what>.+)|\.(?:c|cpp|cu|cuh|h|m):\d+: (?P<check>.+)",
        "llama-server aborted on an internal error ({what}{check}): try other settings or another "
        "build"),
    Cause("context_failed", "max_seq_length", r"failed to create[ _]context",
        "the server could not create its context: check max_seq_length and the extra args"),
)
# fmt: on

# What the server could not load -> the field that named it, and what to call it.
_SUBJECTS: Final = (
    ("failed to load multimodal model", "mmproj_path", "projector"),
    ("failed to load draft model", _EXTRA, "draft model"),
    ("failed to load lora adapter", _EXTRA, "LoRA adapter"),
)
_FLAGS: Final[dict[str | None, str]] = {
    name: f"{row.refused} {row.shadowed}" for name, row in SETTINGS.items()
}
_FIELD_OF: Final = {flag.rstrip("!"): f for f, flags in _FLAGS.items() for flag in flags.split()}
_READY: Final = re.compile(r"\blistening on http")
# Lines that starts which succeed print too: below error level, metadata, debuggers.
_HARMLESS: Final = re.compile(
    r"^[\d.]{6,} [DIWT] |^(INFO|WARN|VERB) \[|\bwarn(ing)?:|pinned memory|- kv +\d+:|"
    r"^(gdb|lldb)\b|fit params to free",
    re.IGNORECASE,
)
_EMPTY_WORDS: Final = re.compile(r"exiting due to|to show complete usage|Failed to init server")
_LONGEST: Final = 240

_CPU: Final = "this build needs instructions that this CPU does not have: use another llama_server"
_SHRUNK: Final = "a mapped file became shorter or unreadable: load again, or check the disk"
_CRASHED: Final = ("crashed", "try another build of llama_server", _SERVER)
_SIGNALS: Final[dict[int, tuple[str, str, str | None]]] = {
    ladder.KILL: ("killed", "memory probably ran out: use a smaller model or context", None),
    signal.SIGTERM: ("killed", "another process sent SIGTERM: load again", None),
    signal.SIGILL: ("wrong_cpu", _CPU, _SERVER),
    signal.SIGSEGV: _CRASHED,
    signal.SIGABRT: _CRASHED,
}
if sys.platform != "win32":
    _SIGNALS[signal.SIGBUS] = ("crashed", _SHRUNK, "model_path")
_BY_NTSTATUS: Final = {  # what Windows has in place of signals
    0xC0000005: signal.SIGSEGV,  # access violation
    0xC000001D: signal.SIGILL,  # illegal instruction
    0xC0000409: signal.SIGABRT,
    0xC000013A: signal.SIGTERM,  # ended by Ctrl-C or Ctrl-Break, or by a keeper
}
_NO_LIBRARY: Final = 0xC0000135
_UNRELATED: Final = (ladder.KILL, signal.SIGILL)  # signals that no output explains


def explain(
    returncode: int | None, log_tail: tuple[str, ...], extra_args: tuple[str, ...] = ()
) -> Problem:
    """Return why a server exited before it was ready.

    Args:
        returncode: Exit status; negative for a signal; None if unknown.
        log_tail: Its last lines, oldest first; all of them go into the problem.
        extra_args: The caller's flags, to tell them from ours.
    """
    lines = _relevant(log_tail)
    signum = _signal_of(returncode)
    match = None if signum in _UNRELATED else _first_match(lines)
    if match is not None:
        reason, message, field = _blame(*match, lines, extra_args)
    else:
        reason, why, field = _by_status(returncode, signum, lines or log_tail)
        message = f"llama-server ended {_how(returncode)} before it was ready: {why}"
    if field is not None and field not in message:
        message = f"{message} (see {field})"
    return Problem("server_start_failed", message, field=field, log_tail=log_tail, reason=reason)


def _relevant(log_tail: tuple[str, ...]) -> tuple[str, ...]:
    """Return the lines after the last start, without the harmless ones."""
    ready = [n for n, line in enumerate(log_tail) if _READY.search(line)]
    since = log_tail[ready[-1] + 1 :] if ready else log_tail
    return tuple(line for line in since if not _HARMLESS.search(line))


def _first_match(lines: tuple[str, ...]) -> tuple[Cause, re.Match[str]] | None:
    latest_first = lines[::-1]
    pairs = itertools.chain(
        ((cause, line) for line in latest_first for cause in CAUSES),
        ((cause, line) for cause in CONSEQUENCES for line in latest_first),
    )
    found = ((cause, re.search(cause.pattern, line, re.IGNORECASE)) for cause, line in pairs)
    return next(((cause, match) for cause, match in found if match), None)


def _blame(
    cause: Cause, found: re.Match[str], lines: tuple[str, ...], extra_args: tuple[str, ...]
) -> tuple[str, str, str | None]:
    """Return the reason, the sentence and the field."""
    groups = {name: _plain(text or "") for name, text in found.groupdict().items()}
    theirs = {flag_of(token) or token for token in extra_args}
    their_fields = {_FIELD_OF[flag] for flag in theirs & _FIELD_OF.keys()}
    field, subject = cause.field, "model"
    if flag := groups.get("flag"):
        flag = flag_of(flag) or flag
        field = _EXTRA if flag in theirs else _FIELD_OF.get(flag, _SERVER)
    elif theirs.intersection(cause.flags.split()) or field in their_fields:
        field = _EXTRA
    elif field == "model_path":
        failed = (rest for text, *rest in _SUBJECTS if any(text in line for line in lines))
        field, subject = next(failed, (field, subject))
    return cause.reason, cause.advice.format(**groups, subject=subject, field=field), field


def _plain(text: str) -> str:
    """Translate the names of C++ functions that llama-server prints as errors."""
    if text.startswith(("stof", "stod")):
        return "not a number"
    if text.startswith("sto"):
        return "not a whole number, or too large"
    return text.strip()[:_LONGEST]


def _signal_of(returncode: int | None) -> int:
    """Return the signal of an exit status, also of a shell's 128 + N; less than 1 is none."""
    status = returncode or 0
    if status in _BY_NTSTATUS:
        return _BY_NTSTATUS[status]
    return -status if status < 0 else status - 128


def _by_status(
    returncode: int | None, signum: int, lines: tuple[str, ...]
) -> tuple[str, str, str | None]:
    """Return the reason, the explanation and the field."""
    if signum in _SIGNALS:
        return _SIGNALS[signum]
    if returncode is not None and returncode < 0:
        return "crashed", "see its output", None
    if returncode in {126, 127}:
        return "not_executable", "the wrapper could not run the binary: check the script", _SERVER
    if returncode == _NO_LIBRARY:
        return "missing_library", "a DLL is missing: reinstall it, or its run-time", _SERVER
    errors = [line for line in lines if re.search("(?i)error|fail", line)]
    best = [line for line in errors if not _EMPTY_WORDS.search(line)] or errors or lines
    return "exited", (best[-1].strip() if best else "") or "it printed nothing", None


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "with an unknown status"
    if returncode > 1 << 16:
        return f"with exit status 0x{returncode:08X}"
    if returncode >= 0:
        return f"with exit status {returncode}"
    known = {signum.value: signum.name for signum in signal.Signals}
    return f"by {known.get(-returncode) or f'signal {-returncode}'}"
