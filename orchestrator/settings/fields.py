"""Every setting of a load, once: a row defines it, and everything else derives from the row.

That is its normal form, its part in identity, its flags and their place in extra args, the HTTP
body and schema, the command-line option, the control in the panel and the reference. `LoadFields`
repeats names and types for type checkers; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Final, Literal, TypedDict, get_args, get_type_hints

from orchestrator.settings import checks, flags
from orchestrator.settings.drafting import OFF

Kind = Literal["chat", "embedding", "rerank"]
Pooling = Literal["none", "mean", "cls", "last", "rank"]
OnBusy = Literal["supersede", "queue", "reject"]
StrPath = str | os.PathLike[str]

_REQUIRED: Final[Any] = dataclasses.MISSING
_MAX: Final = 1 << 30  # tokens or MiB
_MODE: Final = re.compile(r"[a-z0-9][a-z0-9_,-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row.

    Attributes:
        check: Returns the normal form of a value, or None for a blank one, which is the default.
        help: Its meaning in one line.
        default: Its value where a request omits it; None may be given only where this is None.
        argv: The flags it becomes unless it has its default, with `{}` for the value.
        refused: Flags with this meaning that extra args may not contain, in every spelling.
        shadowed: Those that may be in extra args; *inherited* ones are removed where the field is
            set. `!` marks a flag without a value.
        implied: Returns the value that None stands for, from the other fields.
        is_identity: Whether another value needs a reload.
        is_secret: Whether it is left out of everything that is shown.
        option: Its names on the command line, if not derived from its name; () = no option.
        metavar: Its placeholder on the command line; default: the choices.
        bounds: The least and the greatest integer.
        label: Its label in the panel; "" = the panel has no plain control for it.
        blank: The panel's placeholder for an empty control.
    """

    check: checks.Check
    help: str
    default: Any
    argv: str = ""
    refused: str = ""
    shadowed: str = ""
    implied: Callable[[Any], Any] | None = None
    is_identity: bool = False
    is_secret: bool = False
    option: tuple[str, ...] | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None
    label: str = ""
    blank: str = ""

    def normal(self, name: str, value: object) -> Any:
        """Return the normal form of a value.

        Raises:
            InvalidRequest: the value cannot be used; field `name`.
        """
        if value is None and self.default is None:
            return None
        if (found := self.check(name, value)) is None:
            return self.default
        if self.choices and found not in self.choices:
            expected = f"one of {', '.join(self.choices)}"
        elif self.bounds and not self.bounds[0] <= found <= self.bounds[1]:
            expected = "between {} and {}".format(*self.bounds)
        else:
            return found
        raise checks.invalid(name, found, expected)

    def to_argv(self, value: Any) -> list[str]:
        """Return the flags that a value becomes."""
        words = [] if value == self.default else self.argv.split()
        return [word.replace("{}", str(value)) for word in words]


def setting(check: checks.Check, help_: str, *, default: Any = None, **about: Any) -> Any:
    """Return the dataclass field of a row."""
    row = Setting(default=default, check=check, help=help_, **about)
    return field(default=default, metadata={"setting": row})


def _extra_args(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise checks.malformed(name, "a list of strings", value)
    for token in value:
        if not isinstance(token, str):
            raise checks.malformed(name, "a list of strings", token)
    args = tuple(value)
    check_extra_args(args)
    return args


def _speculative_type(name: str, value: object) -> str | None:
    mode = checks.word(name, value)
    if mode is not None and not _MODE.fullmatch(mode):
        raise checks.invalid(name, mode, "default, off or a type that the server lists")
    return OFF if mode == "none" else mode


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoedFields:
    """The settings that answers repeat as they were requested."""

    kind: Kind = setting(
        checks.word,
        "what the server is for",
        default="chat",
        argv="--{}",
        refused="--embedding --embeddings --rerank --reranking",
        is_identity=True,
        choices=get_args(Kind),
        label="Kind",
    )
    pooling: Pooling | None = setting(
        checks.word,
        "how the kinds embedding and rerank pool vectors; null = the model's own way",
        argv="--pooling {}",
        refused="--pooling",
        is_identity=True,
        choices=get_args(Pooling),
        label="Pooling",
        blank="the model's own",
    )
    cache_ram_mib: int | None = setting(
        checks.integer,
        "host memory for cached prompts, MiB; null = the server's default for chat, 0 otherwise",
        argv="--cache-ram {}",
        shadowed="-cram --cache-ram",
        implied=lambda request: None if request.kind == "chat" else 0,
        is_identity=True,
        metavar="N",
        bounds=(0, _MAX),
        label="Prompt cache, MiB",
        blank="default",
    )
    chat_template_override: str | None = setting(
        checks.template,
        "Jinja text; null = the model's own template",
        shadowed="--chat-template --chat-template-file --chat-template-kwargs --jinja! --no-jinja!",
        is_identity=True,
        option=(),
    )
    mmproj_path: str | None = setting(
        checks.path,
        "vision projector file; found automatically for a Hub model",
        refused="-mm --mmproj -mmu --mmproj-url",
        option=("--mmproj", "--mmproj-path"),
        metavar="F",
        label="Vision projector (file)",
        blank="found automatically",
    )
    n_parallel: int | None = setting(
        checks.integer,
        "requests served at the same time; null = the server chooses",
        argv="--parallel {}",
        refused="-np --parallel --n-parallel",
        is_identity=True,
        option=("-np", "--parallel", "--n-parallel"),
        metavar="N",
        bounds=(1, 64),
        label="Parallel slots",
        blank="default",
    )
    idle_ttl_s: float | None = setting(
        checks.seconds,
        "unload after this long without use, seconds; null = the orchestrator's default",
        option=(),
        label="Idle unload, seconds",
        blank="default",
    )
    pinned: bool = setting(
        checks.boolean,
        "never unload this model when idle",
        default=False,
        label="Pinned: never unload when idle",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields(EchoedFields):
    """The rows of a `LoadRequest`."""

    model_path: str = setting(
        checks.model_path,
        "a .gguf file, a folder with one, or a Hub repo owner/name[:VARIANT]",
        default=_REQUIRED,
        option=(),
    )
    gguf_variant: str | None = setting(
        checks.line,
        "quant label, e.g. Q4_K_M, or a path in the repo or folder; null = pick one",
        metavar="V",
    )
    revision: str | None = setting(
        checks.line,
        "branch, tag or commit on the Hub; null = the repo's default branch",
        metavar="R",
        label="Hub revision",
        blank="main",
    )
    hf_token: str | None = setting(
        checks.line,
        "Hub token; never shown",
        is_secret=True,
        option=(),
        label="Hub token",
        blank="never stored",
    )
    max_seq_length: int = setting(
        checks.integer,
        "context in tokens; 0 = Auto (the server decides)",
        default=0,
        argv="-c {}",
        shadowed="-c --ctx-size",
        is_identity=True,
        metavar="N",
        bounds=(0, _MAX),
    )
    cache_type_kv: str | None = setting(
        checks.word,
        "KV cache type for K and V, e.g. q8_0; null = the server's default",
        argv="-ctk {} -ctv {}",
        shadowed="-ctk --cache-type-k -ctv --cache-type-v",
        is_identity=True,
        metavar="T",
        choices=flags.CACHE_TYPES,
    )
    speculative_type: str | None = setting(
        _speculative_type,
        "drafting: default, off, ngram-mod or a type the server lists; null = off unless inherited",
        shadowed=(
            "--spec-default! --spec-type --spec-ngram-size-n --spec-ngram-size --draft --draft-n "
            "--draft-max --draft-min --draft-n-min --spec-ngram-mod-n-match --spec-ngram-mod-n-min "
            "--spec-ngram-mod-n-max --spec-draft-n-max --spec-draft-n-min --spec-draft-p-min "
            "--draft-p-min --spec-draft-p-split --draft-p-split -md --model-draft "
            "--spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf"
        ),
        metavar="S",
    )
    llama_extra_args: tuple[str, ...] | None = setting(
        _extra_args, "llama-server flags; null = inherit, [] = clear", option=()
    )
    force_reload: bool = setting(
        checks.boolean,
        "reload even when nothing differs",
        default=False,
        option=(),
        label="Reload even when nothing differs",
    )
    on_busy: OnBusy = setting(
        checks.string,
        "what to do when another load is in flight",
        default="supersede",
        option=(),
        choices=get_args(OnBusy),
        label="While another load runs",
    )
    load_request_id: str | None = setting(
        checks.request_id, "the caller's handle for a scoped cancel", option=()
    )
    prefetch: bool = setting(
        checks.boolean,
        "download first, while the running model keeps serving",
        default=False,
        label="Download first, while the running model serves",
    )
    restore_previous: bool = setting(
        checks.boolean,
        "if this start fails, bring the previous model back",
        default=False,
        label="Bring the previous model back if this one fails",
    )
    stall_timeout_s: float = setting(
        checks.seconds,
        "give up after this long without any progress, seconds",
        default=600.0,
        option=("--stall-timeout",),
        metavar="S",
    )
    deadline_s: float | None = setting(
        checks.seconds,
        "give up after this long in total, seconds; a caller that joins a load gets its deadline",
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


_ROWS: Final[dict[str, Setting]] = {f.name: f.metadata["setting"] for f in fields(Fields)}
SETTINGS: Final = {name: _ROWS[name] for name in LoadFields.__annotations__}  # in reading order
ECHOED: Final = tuple(name for name in SETTINGS if name in {f.name for f in fields(EchoedFields)})
SHADOWED: Final = {name: row.shadowed for name, row in SETTINGS.items() if row.shadowed}
"""Flags that are removed from *inherited* args where a request sets the field."""

REFUSED: Final = flags.REFUSED | {
    f"use the field {name} instead"
    + f" ({', '.join(row.choices)})" * bool(row.choices): row.refused
    for name, row in SETTINGS.items()
    if row.refused
}
check_extra_args: Final = flags.RefusedFlags(REFUSED).check


def strip_shadowed(args: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    """Return `args` without the flags of these fields and their values."""
    return flags.without(args, (flag for name in names for flag in SHADOWED[name].split()))


@cache
def types() -> dict[str, Any]:
    """Return the annotation of every setting; cached because resolving them is slow."""
    return get_type_hints(Fields)


def type_of(name: str) -> type:
    """Return bool, int, float or, for everything else, str."""
    numbers: dict[checks.Check, type] = {
        checks.boolean: bool,
        checks.integer: int,
        checks.seconds: float,
    }
    return numbers.get(SETTINGS[name].check, str)
