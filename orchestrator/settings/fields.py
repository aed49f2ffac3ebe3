"""Every setting of a load, once: a row says what it is, and everything else derives from it.

From a row come its normal form, its part in identity, its flags and what extra args may do with
them, the body and the document of HTTP, the option of the command line, the control in the panel
and the reference. Beside its row, a setting has one line in `LoadFields`, for type checkers; a test
compares the two.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import (
    Any,
    Final,
    Literal,
    TypedDict,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from orchestrator.settings import checks, flags

Kind = Literal["chat", "embedding", "rerank"]
Pooling = Literal["none", "mean", "cls", "last", "rank"]
OnBusy = Literal["supersede", "queue", "reject"]
StrPath = str | os.PathLike[str]

_T = TypeVar("_T")
_REQUIRED: Final[Any] = dataclasses.MISSING
_MAX_CONTEXT: Final = 1 << 30
_MAX_CACHE_MIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row.

    Attributes:
        default: What is meant where nothing is said.
        check: Returns the normal form of a value, or refuses it.
        help: What it means, in one line, for every reference.
        argv: What it adds to the server's command line where it is set: words with `{}` for the
            value, or words by value.
        flags: Every spelling of the flags that mean the same; `!` marks one without a value.
        in_extra_args: May extra args have these flags? Then they are taken out of *inherited* ones
            where the field is set; otherwise they are refused there.
        implied: What is meant by other fields where it is None.
        is_identity: Is a change of it a reload, by its value alone?
        is_secret: Never shown.
        option: Its names on the command line, if they are not made from its own; () = none.
        metavar: What the command line calls its value.
        choices: The words it may be.
        least, most: The bounds of a number.
        label: What the panel calls it among the plain controls; "" = it draws this one by hand.
        blank: What the panel shows while nothing is written there.
    """

    default: Any
    check: checks.Check
    help: str
    argv: str | Mapping[str, str] = ""
    flags: str = ""
    in_extra_args: bool = True
    implied: Callable[[Any], Any] | None = None
    is_identity: bool = False
    is_secret: bool = False
    option: tuple[str, ...] | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    label: str = ""
    blank: str = ""

    def words(self, value: Any) -> list[str]:
        """Return what a value adds to the command line."""
        if value == self.default or not self.argv:
            return []
        words = self.argv if isinstance(self.argv, str) else self.argv.get(value, "")
        return [str(value) if word == "{}" else word for word in words.split()]


def setting(default: _T, check: checks.Check, help_: str, **about: Any) -> _T:
    """Return the field of a row."""
    row = Setting(default=default, check=check, help=help_, **about)
    return field(default=default, metadata={"setting": row})


def _extra_args(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise checks.malformed(name, "a list of strings", value)
    args = tuple(value)
    for token in args:
        if not isinstance(token, str):
            raise checks.malformed(name, "a list of strings", token)
    check_extra_args(args)
    return args


def _cache_type(name: str, value: object) -> str | None:
    return flags.normal_cache_type(checks.line(name, value))


def _speculative_type(name: str, value: object) -> str | None:
    return flags.normal_speculative_type(checks.line(name, value))


def _kind(name: str, value: object) -> object:
    if value is None:
        raise checks.malformed(name, "a string", value)
    return checks.word_of(*get_args(Kind))(name, value) or "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class AsAsked:
    """The settings that answers show as they were asked for."""

    kind: Kind = setting(
        "chat",
        _kind,
        "what the server is for",
        argv=MappingProxyType({"embedding": "--embedding", "rerank": "--rerank"}),
        flags="--embedding! --embeddings! --rerank! --reranking!",
        in_extra_args=False,
        is_identity=True,
        choices=get_args(Kind),
        label="Kind",
    )
    pooling: Pooling | None = setting(
        None,
        checks.word_of(*get_args(Pooling)),
        "how the kinds embedding and rerank make one vector of many; null = the model's own",
        argv="--pooling {}",
        flags="--pooling",
        in_extra_args=False,
        is_identity=True,
        choices=get_args(Pooling),
        label="Pooling",
        blank="the model's own",
    )
    cache_ram_mib: int | None = setting(
        None,
        checks.optional(checks.whole(0, _MAX_CACHE_MIB)),
        "host memory for cached prompts, MiB; null = the server's own for chat, 0 for other kinds",
        argv="--cache-ram {}",
        flags="-cram --cache-ram",
        implied=lambda request: None if request.kind == "chat" else 0,
        is_identity=True,
        metavar="N",
        least=0,
        most=_MAX_CACHE_MIB,
        label="Prompt cache, MiB",
        blank="default",
    )
    chat_template_override: str | None = setting(
        None,
        checks.template,
        "Jinja text; null = the model's own template",
        flags="--chat-template --chat-template-file --chat-template-kwargs --jinja! --no-jinja!",
        is_identity=True,
        option=(),
    )
    mmproj_path: str | None = setting(
        None,
        checks.path,
        "vision projector file; found by itself for a Hub model",
        flags="-mm --mmproj -mmu --mmproj-url",
        in_extra_args=False,
        option=("--mmproj", "--mmproj-path"),
        metavar="F",
        label="Vision projector (file)",
        blank="found by itself",
    )
    n_parallel: int | None = setting(
        None,
        checks.optional(checks.whole(1, 64)),
        "requests served at the same time; null = as many as the server chooses",
        argv="--parallel {}",
        flags="-np --parallel --n-parallel",
        in_extra_args=False,
        is_identity=True,
        option=("-np", "--parallel", "--n-parallel"),
        metavar="N",
        least=1,
        most=64,
        label="Parallel slots",
        blank="default",
    )
    idle_ttl_s: float | None = setting(
        None,
        checks.optional(checks.seconds),
        "unload after this long without use, seconds; null = the orchestrator's",
        option=(),
        label="Idle unload, seconds",
        blank="default",
    )
    pinned: bool = setting(
        False,
        checks.boolean,
        "never unload it for being idle",
        label="Pinned: never unload when idle",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields(AsAsked):
    """The rows of a `LoadRequest`; `model_path` comes first."""

    model_path: str = setting(
        _REQUIRED,
        checks.model_path,
        "a .gguf file, a folder with one, or a Hub repo owner/name[:VARIANT]",
        option=(),
    )
    gguf_variant: str | None = setting(
        None,
        checks.line,
        "quant label, e.g. Q4_K_M, or a path inside the repo or folder; null = pick",
        metavar="V",
    )
    revision: str | None = setting(
        None,
        checks.line,
        "branch, tag or commit on the Hub; null = the repo's default branch",
        metavar="R",
        label="Hub revision",
        blank="main",
    )
    hf_token: str | None = setting(
        None,
        checks.line,
        "Hub token; never shown",
        is_secret=True,
        option=(),
        label="Hub token",
        blank="never stored",
    )
    max_seq_length: int = setting(
        0,
        checks.whole(0, _MAX_CONTEXT),
        "context in tokens; 0 = Auto (the server decides)",
        argv="-c {}",
        flags="-c --ctx-size",
        is_identity=True,
        metavar="N",
        least=0,
        most=_MAX_CONTEXT,
    )
    cache_type_kv: str | None = setting(
        None,
        _cache_type,
        "KV cache type for K and V, e.g. q8_0; null = the server's own",
        argv="-ctk {} -ctv {}",
        flags="-ctk --cache-type-k -ctv --cache-type-v",
        is_identity=True,
        metavar="T",
    )
    speculative_type: str | None = setting(
        None,
        _speculative_type,
        "drafting: default, off, ngram-mod or a type the server lists; null = off, inherited stay",
        flags=(
            "--spec-default! --spec-type --spec-ngram-size-n --spec-ngram-size --draft --draft-n "
            "--draft-max --draft-min --draft-n-min --spec-ngram-mod-n-match --spec-ngram-mod-n-min "
            "--spec-ngram-mod-n-max --spec-draft-n-max --spec-draft-n-min --spec-draft-p-min "
            "--draft-p-min --spec-draft-p-split --draft-p-split -md --model-draft "
            "--spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf"
        ),
        metavar="S",
    )
    llama_extra_args: tuple[str, ...] | None = setting(
        None, _extra_args, "llama-server flags; null = inherit, [] = clear", option=()
    )
    force_reload: bool = setting(
        False,
        checks.boolean,
        "reload even when nothing differs",
        option=(),
        label="Reload even when nothing differs",
    )
    on_busy: OnBusy = setting(
        "supersede",
        checks.one_of(*get_args(OnBusy)),
        "what to do when another load is in flight",
        option=(),
        choices=get_args(OnBusy),
        label="While another load runs",
    )
    load_request_id: str | None = setting(
        None, checks.request_id, "the caller's handle for a scoped cancel", option=()
    )
    prefetch: bool = setting(
        False,
        checks.boolean,
        "download first, while what runs keeps serving",
        label="Download first, while the running model serves",
    )
    restore_previous: bool = setting(
        False,
        checks.boolean,
        "if this start fails, bring the previous model back",
        label="Bring the previous model back if this one fails",
    )
    stall_timeout_s: float = setting(
        600.0,
        checks.seconds,
        "give up after this long without any progress, seconds",
        option=("--stall-timeout",),
        metavar="S",
    )
    deadline_s: float | None = setting(
        None,
        checks.optional(checks.seconds),
        "give up after this long in all, seconds; who joins a load in flight shares its limits",
        option=("--deadline",),
        metavar="S",
        label="Deadline, seconds",
        blank="none",
    )


class LoadFields(TypedDict, total=False):
    """The fields of a `LoadRequest` by name, for type checkers and editors."""

    model_path: StrPath
    kind: Kind
    pooling: Pooling | None
    cache_ram_mib: int | None
    gguf_variant: str | None
    revision: str | None
    hf_token: str | None
    max_seq_length: int
    cache_type_kv: str | None
    speculative_type: str | None
    chat_template_override: str | None
    llama_extra_args: Sequence[str] | None
    mmproj_path: StrPath | None
    n_parallel: int | None
    force_reload: bool
    on_busy: OnBusy
    load_request_id: str | None
    prefetch: bool
    restore_previous: bool
    idle_ttl_s: float | None
    pinned: bool
    stall_timeout_s: float
    deadline_s: float | None


def _rows() -> dict[str, Setting]:
    """Return the rows in the order in which they are shown."""
    rows: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(Fields)}
    return {name: rows[name] for name in LoadFields.__annotations__}


SETTINGS: Final = _rows()
SHOWN: Final = tuple(name for name in SETTINGS if name in {f.name for f in fields(AsAsked)})
SHADOWED: Final = {
    name: row.flags for name, row in SETTINGS.items() if row.flags and row.in_extra_args
}
"""Flags that a field takes over from *inherited* args."""

REFUSED: Final = {
    **flags.REFUSED,
    **{
        f"use the field {name}": row.flags.replace("!", "")
        for name, row in SETTINGS.items()
        if not row.in_extra_args
    },
}
check_extra_args: Final = flags.Refused(REFUSED).check


def strip_shadowed(args: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    """Return `args` without the flags, and their values, that the given fields own."""
    return flags.without(args, (flag for name in names for flag in SHADOWED[name].split()))


@cache
def types() -> dict[str, Any]:
    """Return the annotation of every setting; to read them all takes a while."""
    return get_type_hints(Fields)


def type_of(name: str) -> type:
    """Return the plain type of a setting: str, int, float, bool or tuple."""
    hint = types()[name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    plain = kinds[0] if kinds and get_origin(hint) is not Literal else hint
    origin = get_origin(plain)
    return cast("type", str if origin is Literal else origin or plain)
