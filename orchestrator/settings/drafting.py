"""Drafting modes: the flags that a `speculative_type` means, and the mode that flags mean.

Names of these flags differ between builds of llama-server, and a removed one aborts the start.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from orchestrator.errors import InvalidRequest
from orchestrator.settings.flags import flag_of
from orchestrator.settings.help_text import Catalogue

OFF: Final = "off"
SPECULATIVE: Final[dict[str, tuple[str, ...]]] = {
    "default": ("--spec-default",),
    "ngram-mod": (
        (
            "--spec-type ngram-mod --spec-ngram-mod-n-match 24 --spec-ngram-mod-n-min 48 "
            "--spec-ngram-mod-n-max 64"
        ),
        "--spec-type ngram-mod --spec-ngram-size-n 24 --draft-min 48 --draft-max 64",
    ),
    "ngram-simple": ("--spec-type ngram-simple",),
}
"""The flags of each mode; of several, the first that the binary supports."""

_DRAFT_MODEL: Final = {
    *("-md", "--model-draft", "--spec-draft-model"),
    *("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf"),
}


def has_explicit_mode(extra_args: tuple[str, ...]) -> bool:
    """Return whether these flags select drafting modes themselves."""
    return any(flag_of(token) in {"--spec-type", "--spec-default"} for token in extra_args)


def has_draft_model(extra_args: tuple[str, ...]) -> bool:
    """Return whether these flags name a model that drafts."""
    return any(flag_of(token) in _DRAFT_MODEL for token in extra_args)


def explicit_mode(extra_args: tuple[str, ...]) -> str:
    """Return the mode that these flags select, as a `speculative_type`.

    Several modes add up, separated by commas; a draft model alone is `draft`.
    """
    modes: list[str] = []
    for token, following in pairwise((*extra_args, "")):
        match flag_of(token):
            case "--spec-default":
                modes.append("default")
            case "--spec-type":
                value = token.partition("=")[2] if "=" in token else following
                modes += (mode.strip().lower() for mode in value.split(","))
    selected = [mode for mode in dict.fromkeys(modes) if mode not in {"", "none"}]
    is_draft = not modes and has_draft_model(extra_args)
    return ",".join(selected) or ("draft" if is_draft else OFF)


def speculative_flags(
    mode: str | None, extra_args: tuple[str, ...], catalogue: Catalogue | None = None
) -> tuple[str, ...]:
    """Return the flags of a mode that this binary supports.

    There are none where the extra args select modes themselves: modes add up, and a later flag
    cannot undo an earlier one. Without a catalogue the newest names are used.

    Raises:
        InvalidRequest: this binary does not support the mode; the message lists those it does.
    """
    if mode is None or has_explicit_mode(extra_args):
        return ()
    if flags := _flags_of(mode, catalogue):
        return flags
    raise InvalidRequest.because(
        f"speculative_type {mode!r} is not supported by this llama-server: use one of "
        f"{', '.join(accepted_modes(catalogue))}",
        field="speculative_type",
    )


def _flags_of(mode: str, catalogue: Catalogue | None) -> tuple[str, ...]:
    types = _listed_types(catalogue)
    for candidate in SPECULATIVE.get(mode, (f"--spec-type {mode}",)):
        flags = tuple(candidate.split())
        if catalogue is None:
            return flags
        is_listed = not types or flags[0] != "--spec-type" or {*flags[1].split(",")} <= {*types}
        if is_listed and catalogue.has(*(flag for flag in flags if flag.startswith("--"))):
            return flags
    return ()


def _listed_types(catalogue: Catalogue | None) -> tuple[str, ...]:
    listed = catalogue.get("--spec-type") if catalogue is not None else None
    return listed.choices if listed is not None else ()


def accepted_modes(catalogue: Catalogue | None) -> list[str]:
    """Return every `speculative_type` that the binary supports, `off` first."""
    modes = dict.fromkeys((*SPECULATIVE, *_listed_types(catalogue)))
    return [OFF, *(mode for mode in modes if mode != "none" and _flags_of(mode, catalogue))]
