"""The environment of a server: an allow-list, what the caller names, and our own token and key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from orchestrator.errors import InvalidRequest
from orchestrator.server.slot import Slot

_INHERITED: Final = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "XDG_RUNTIME_DIR", "SYSTEMROOT"),
        *("NVIDIA_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"),
    )
)
_INHERITED_PREFIXES: Final = ("LC_", "CUDA_", "HIP_", "ROCR_", "HSA_", "GGML_", "VK_", "OMP_")
_NEVER_INHERITED: Final = frozenset({"GGML_BACKEND_PATH"})  # loads any shared library
_NEVER_NAMED: Final = {
    "LLAMA_ARG_": "use a field of the request, or llama_extra_args",
    "LLAMA_API_KEY": "the orchestrator owns keys",
    "LLAMA_SERVER_": "it changes what the server is",
    "GGML_BACKEND_PATH": "it loads any shared library",
    "AIP_": "it would override the server's address",
    "HF_TOKEN": "the server never downloads",
    "HUGGING_FACE_HUB_TOKEN": "the server never downloads",
}
_API_KEY: Final = "LLAMA_API_KEY"
_HARDENED: Final = {  # by the names of several builds; one that does not know a name ignores it
    "LLAMA_ARG_UI": "0",
    "LLAMA_ARG_WEBUI": "0",
    "LLAMA_ARG_NO_WEBUI": "1",
    "LLAMA_ARG_CORS_ORIGINS": "localhost",
}


def inherited_environment() -> dict[str, str]:
    """Return what a server may see of the host's environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES))
        and name not in _NEVER_INHERITED
    }


def child_environment(
    extra: Mapping[str, str], slot: Slot, api_keys: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the server's whole environment: an allow-list, what the caller names, our token.

    Args:
        api_keys: Any of these the server is to ask everybody for; the first is its own. Here,
            because anybody can read a command line, and a file would have to be removed again; an
            environment is its owner's.
    """
    name, _, value = slot.token.partition("=")
    protection = {} if api_keys is None else {**_HARDENED, _API_KEY: ",".join(api_keys)}
    return {**inherited_environment(), **extra, **protection, name: value}


def check_server_env(extra: Mapping[Any, Any]) -> None:
    """Refuse what no process could be given, and what would undo the orchestrator's own choices.

    Raises:
        InvalidRequest: names the variable, never its value (field `server_env`).
    """
    for name, value in extra.items():
        problem = next(
            (why for prefix, why in _NEVER_NAMED.items() if str(name).startswith(prefix)), None
        )
        if not isinstance(name, str) or not isinstance(value, str):
            problem = "names and values must be strings"
        elif not name or "=" in name or "\0" in name + value:
            problem = "not a variable an environment can hold"
        if problem is not None:
            raise InvalidRequest.because(f"server_env: {name!r}: {problem}", field="server_env")
