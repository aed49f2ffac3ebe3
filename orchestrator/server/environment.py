"""The environment of a server: inherited variables on a list, the caller's, our token and key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from orchestrator.base import launch
from orchestrator.errors import InvalidRequest
from orchestrator.server.slot import Slot

_INHERITED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "XDG_RUNTIME_DIR"),
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "USERPROFILE", "USERNAME"),  # of
    *("APPDATA", "LOCALAPPDATA", "PROGRAMDATA", "PROGRAMFILES", "NUMBER_OF_PROCESSORS"),  # Windows
    *("NVIDIA_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"),
)
_INHERITED_PREFIXES: Final = ("LC_", "CUDA_", "HIP_", "ROCR_", "HSA_", "GGML_", "VK_", "OMP_")
_NEVER_INHERITED: Final = "GGML_BACKEND_PATH"
API_KEY_NAME: Final = "LLAMA_API_KEY"
IMPORT_PATH_NAME: Final = "LLAMA_ORCHESTRATOR_IMPORT_PATH"  # of the embedded server
_REFUSED: Final = {  # prefixes
    "LLAMA_ARG_": "use a field of the request, or llama_extra_args",
    API_KEY_NAME: "the orchestrator owns keys",
    "LLAMA_SERVER_": "it changes what the server is",
    _NEVER_INHERITED: "it loads any shared library",
    "AIP_": "it would override the server's address",
    "HF_TOKEN": "the server never downloads",
    "HUGGING_FACE_HUB_TOKEN": "the server never downloads",
}
_HARDENED: Final = {  # by the names of several builds, which ignore those they do not know
    "LLAMA_ARG_UI": "0",
    "LLAMA_ARG_WEBUI": "0",
    "LLAMA_ARG_NO_WEBUI": "1",
    "LLAMA_ARG_CORS_ORIGINS": "localhost",
}


def inherited_environment(kind: str = "external") -> dict[str, str]:
    """Return the variables that a server of this kind, or the keeper, gets from its host."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and name != _NEVER_INHERITED
    }
    if kind == "embedded":
        inherited[IMPORT_PATH_NAME] = json.dumps(launch.import_path())
    return inherited


def child_environment(
    extra: Mapping[str, str],
    slot: Slot,
    api_key: str | None = None,
    kind: str = "external",
) -> dict[str, str]:
    """Return the whole environment of a server.

    Args:
        extra: The caller's variables.
        api_key: The key it requires, if any. It is passed here because other users can read a
            command line, but not an environment.
    """
    name, _, value = slot.token.partition("=")
    key = {} if api_key is None else {API_KEY_NAME: api_key}
    return {**inherited_environment(kind), **extra, **_HARDENED, **key, name: value}


def check_server_env(extra: Mapping[Any, Any]) -> None:
    """Refuse variables that no process can have, or that override the orchestrator's choices.

    Raises:
        InvalidRequest: Names the variable, never its value (field `server_env`).
    """
    for name, value in extra.items():
        problem = next((w for prefix, w in _REFUSED.items() if str(name).startswith(prefix)), None)
        if not isinstance(name, str) or not isinstance(value, str):
            problem = "names and values must be strings"
        elif not name or "=" in name or "\0" in name + value:
            problem = "it is not a valid name and value of an environment variable"
        if problem is not None:
            raise InvalidRequest.because(f"server_env: {name!r}: {problem}", field="server_env")
