"""Why a server did not start: its last output and exit status, read into one sentence.

Pure and table-driven: every real start failure of llama-server ends with exit status 1, so the
output decides. Rows are tried in order; what no row knows keeps its last error line. Texts come
from provoking them on llama.cpp build 11434 and, for accelerators, from its sources' messages.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Final

from orchestrator.errors import Problem
from orchestrator.server_args import flag_of


@dataclass(frozen=True, slots=True)
class Cause:
    """One row: what the output says, and what to tell the caller.

    Attributes:
        reason: Stable word for programs.
        pattern: Searched in every line; a group `flag` names the flag to blame.
        advice: What happened and what to do; may use the groups of the pattern.
        field: The request field to change, unless a blamed flag came from the extra args.
    """

    reason: str
    pattern: re.Pattern[str]
    advice: str
    field: str | None = None


def _cause(reason: str, pattern: str, advice: str, field: str | None = None) -> Cause:
    return Cause(reason, re.compile(pattern, re.IGNORECASE), advice, field)


_OUT_OF_MEMORY: Final = (
    r"out of memory|OutOfDeviceMemory|failed to allocate|unable to allocate|bad_alloc|"
    r"cannot allocate memory|insufficient memory|alloc_tensor_range: failed"
)

CAUSES: Final = (
    _cause(
        "missing_library",
        r"error while loading shared libraries: (?P<what>[^:]+)",
        "the shared library {what} is missing: reinstall llama-server, or set LD_LIBRARY_PATH",
        "llama_server",
    ),
    _cause(
        "removed_flag",
        r'handling argument "(?P<flag>-[^"]+)": the argument has been removed\.?(?P<what>.*)',
        "this llama-server has removed {flag}:{what}",
    ),
    _cause(
        "malformed_flag",
        r'error while handling argument "(?P<flag>-[^"]+)": (?P<what>.*)',
        "llama-server cannot use the value of {flag} ({what})",
    ),
    _cause(
        "unknown_flag",
        r"error: invalid argument: (?P<flag>\S+)",
        "this llama-server does not know {flag}: remove it, or use a build that has it",
    ),
    _cause(
        "port_in_use",
        r"couldn't bind HTTP server socket",
        "the server could not bind its port: try again",
    ),
    _cause(
        "unknown_architecture",
        r"unknown model architecture: '(?P<what>[^']*)'",
        "this llama-server does not know the architecture {what!r}: use a newer build",
        "model_path",
    ),
    _cause(
        "corrupt_model",
        r"data is not within the file bounds|corrupted or incomplete|invalid magic|wrong number of "
        r"tensors|missing tensor|invalid gguf",
        "the model file is damaged or incomplete: download it again",
        "model_path",
    ),
    _cause(
        "projector_mismatch",
        r"failed to load CLIP model|failed to load multimodal model|mismatch between text model",
        "the projector does not fit the model: choose the one that belongs to it",
        "mmproj_path",
    ),
    _cause(
        "bad_template",
        r"chat template is not supported|failed to apply template|failed to parse chat template",
        "the chat template cannot be used: check its Jinja syntax",
        "chat_template_override",
    ),
    _cause(
        "out_of_memory",
        r"(kv cache|kv_cache|llama_init_from_model|create_context).*(" + _OUT_OF_MEMORY + ")",
        "not enough memory for this context: use a smaller max_seq_length or a smaller "
        "cache_type_kv",
        "max_seq_length",
    ),
    _cause(
        "out_of_memory",
        _OUT_OF_MEMORY,
        "not enough memory: use a smaller model or context, or fewer layers on the GPU (-ngl)",
    ),
    _cause(
        "permission",
        r"permission denied",
        "the server may not read a file it needs: check permissions",
    ),
    _cause(
        "context_failed",
        r"failed to create_context|failed to create context",
        "the server could not create its context: check max_seq_length and the extra args",
        "max_seq_length",
    ),
)

_SIGNALS: Final = {
    signal.SIGKILL: ("killed", "it was killed, most likely by the kernel for want of memory"),
    signal.SIGILL: ("wrong_cpu", "this build needs instructions that this CPU does not have"),
    signal.SIGSEGV: ("crashed", "it crashed: try another build of llama-server"),
    signal.SIGABRT: ("crashed", "it gave up on an internal error: see its output"),
}


def explain(
    returncode: int | None, log_tail: tuple[str, ...], extra_args: tuple[str, ...] = ()
) -> Problem:
    """Return why a server that ended before it was ready did so, as far as it can be told.

    Args:
        returncode: Exit status; negative for a signal; None when nobody saw it.
        log_tail: Its last lines, oldest first.
        extra_args: What the caller gave, to tell a flag of theirs from one of ours.
    """
    for cause in CAUSES:
        for line in log_tail:
            if found := cause.pattern.search(line):
                return _blame(cause, found, log_tail, extra_args)
    reason, said = _by_status(returncode, log_tail)
    message = f"llama-server ended {_how(returncode)} before it was ready: {said}"
    return Problem("server_start_failed", message, log_tail=log_tail, reason=reason)


def _blame(
    cause: Cause, found: re.Match[str], log_tail: tuple[str, ...], extra_args: tuple[str, ...]
) -> Problem:
    groups = {name: (text or "").rstrip() for name, text in found.groupdict().items()}
    field, message = cause.field, cause.advice.format(**groups)
    if "flag" in groups and groups["flag"] in {flag_of(token) for token in extra_args}:
        field, message = "llama_extra_args", f"{message} (it is in llama_extra_args)"
    return Problem(
        "server_start_failed", message, field=field, log_tail=log_tail, reason=cause.reason
    )


def _by_status(returncode: int | None, log_tail: tuple[str, ...]) -> tuple[str, str]:
    if returncode is not None and -returncode in _SIGNALS:
        return _SIGNALS[signal.Signals(-returncode)]
    if returncode is not None and returncode - 128 in _SIGNALS:  # a shell wrapper's way to say it
        return _SIGNALS[signal.Signals(returncode - 128)]
    if returncode is not None and returncode < 0:
        return "crashed", "see its output"
    errors = (line for line in reversed(log_tail) if "error" in line.lower())
    return "exited", next(errors, log_tail[-1] if log_tail else "it printed nothing").strip()


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "with an unknown status"
    if returncode >= 0:
        return f"with exit status {returncode}"
    try:
        return f"by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"by signal {-returncode}"
