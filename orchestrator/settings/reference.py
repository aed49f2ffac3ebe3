"""Hub repos as a request names them."""

from __future__ import annotations

import re
from typing import Final

_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_REPO_CHARACTERS: Final = 96
_ADDRESS: Final = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/([^?#]*)(?:[?#].*)?",
    re.IGNORECASE,
)
_PLACE: Final = re.compile(r"([^/]+/[^/:]+)/(?:tree|blob|resolve)/([^/]+)(?:/(.+\.gguf))?")


def of_address(model_path: str) -> tuple[str, str | None] | None:
    """Return the repo (`owner/name`, `owner/name:VARIANT`) and the revision that an address on the
    Hub means, None if it means none. What is no address is returned as it is.
    """
    if (address := _ADDRESS.fullmatch(model_path)) is None:
        return model_path, None
    path, revision = address[1].rstrip("/"), None
    if place := _PLACE.fullmatch(path):
        path = f"{place[1]}:{place[3]}" if place[3] else place[1]
        revision = None if place[2] == "main" else place[2]
    is_repo = split_reference(path) is not None and "%" not in address[1]
    return (path, revision) if is_repo else None


def split_reference(model_path: str) -> tuple[str, str | None] | None:
    """Return the repo id and the variant of `owner/name` or `owner/name:VARIANT`, or None where it
    cannot be a Hub repo: a path, or characters that the Hub does not allow.

    Source: the rules of `huggingface_hub.utils.validate_repo_id`.
    """
    repo, colon, variant = model_path.partition(":")
    if (
        _REPO.fullmatch(repo) is None
        or len(repo) > _MAX_REPO_CHARACTERS
        or "--" in repo
        or ".." in repo
        or any(part.endswith(("-", ".")) for part in repo.split("/"))
        or repo.endswith((".gguf", ".git"))
    ):
        return None
    if not colon:
        return repo, None
    return (repo, variant.strip()) if variant.strip() else None
