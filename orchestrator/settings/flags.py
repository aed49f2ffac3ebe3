"""llama-server's flags: how they are read, which are refused, which mean a drafting mode.

Pure, and driven by the tables below; beside these, the rows of fields.py and argv.py nothing in the
library knows the name of a flag. A flag is the same in every spelling that llama-server takes for
it; one that is refused is refused in every spelling that somebody could mean it by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from orchestrator.errors import InvalidRequest, RefusedArgument

if TYPE_CHECKING:
    from orchestrator.settings.help_text import Catalogue

OFF: Final = "off"
CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

# reason -> flags (every alias), but for those that a field of fields.py is to be used for. The
# environment twins never reach the child: its environment is an allow-list (environment.py).
REFUSED: Final[dict[str, str]] = {
    "the model is chosen by model_path and gguf_variant": (
        "-m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hfv -hfrv "
        "--hf-repo-v -hffv --hf-file-v -hft --hf-token -a --alias"
    ),
    "the orchestrator owns the server's address": (
        "--host --port --path --api-prefix --reuse-port"
    ),
    "the orchestrator owns keys and TLS": (
        "--api-key --api-key-file --ssl-key-file --ssl-cert-file"
    ),
    "the server's web UI stays off": (
        "--webui --no-webui --ui --no-ui --ui-config --webui-config --ui-config-file "
        "--webui-config-file --ui-mcp-proxy --no-ui-mcp-proxy --webui-mcp-proxy "
        "--no-webui-mcp-proxy"
    ),
    "one server serves one model: router mode is refused": (
        "--models-dir --models-preset --models-max --models-autoload --no-models-autoload"
    ),
    "server-side tools run code on this machine": (
        "--tools --tools-runtime -ag --agent -no-ag --no-agent --mcp-servers-config "
        "--mcp-servers-json"
    ),
    "cross-origin rules belong to the orchestrator": (
        "--cors-origins --cors-methods --cors-headers --cors-credentials --no-cors-credentials"
    ),
    "it reads or writes files of the caller's choice": (
        "--media-path --slot-save-path --log-file --log-disable --log-prompts-dir"
    ),
    "it prints and exits": (
        "-h --help --usage --version --list-devices -cl --cache-list --completion-bash"
    ),
    "it brings a model and a port of its own": (
        "--embd-gemma-default --embd-bge-small-en-default --embd-e5-small-en-default "
        "--embd-gte-small-default --fim-qwen-1.5b-default --fim-qwen-3b-default "
        "--fim-qwen-7b-default --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default "
        "--gpt-oss-20b-default --gpt-oss-120b-default --vision-gemma-4b-default "
        "--vision-gemma-12b-default"
    ),
}
_LONGER: Final = frozenset({"-md", "-mg", "-mmdev", "-hfd", "-hfrd"})  # begin like a refused one

_DRAFT_MODEL: Final = {
    *("-md", "--model-draft", "--spec-draft-model"),
    *("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf"),
}

# What extra args may not do where models are confined to folders: to name a file outside, and to
# reach out: to other machines, to programs, or to files that are written.
FILES: Final = (
    "-md --model-draft --spec-draft-model -mv --model-vocoder --lora --lora-scaled "
    "--control-vector --control-vector-scaled --grammar-file -jf --json-schema-file "
    "--chat-template-file -lcs --lookup-cache-static --tts-speaker-file -f --file -bf "
    "--binary-file -sysf --system-prompt-file --in-file --context-file --image --audio --video"
)
REACHING: Final = (
    "-hfd -hfrd --hf-repo-draft --spec-draft-hf --rpc --server-base --video-ffmpeg-dir "
    "-lcd --lookup-cache-dynamic --prompt-cache -o --output --output-file --logits-output-dir"
)
_FILES, _REACHING = frozenset(FILES.split()), frozenset(REACHING.split())

MAX_TOKENS: Final = 256
MAX_BYTES: Final = 32 * 1024
_NUMBER: Final = re.compile(
    r"[-+]?((\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?|inf(inity)?|nan)", re.ASCII | re.IGNORECASE
)
_WORD: Final = re.compile(r"(--?[a-z][a-z-]*)[a-z0-9.-]*")


def flag_of(token: str) -> str | None:
    """Return the flag a token names, in llama-server's own spelling, or None for a value.

    `--flag=value`, underscores and padding all name the same flag; negative numbers are values.
    """
    text = token.strip()
    if not text.startswith("-") or text in {"-", "--"} or _NUMBER.fullmatch(text):
        return None
    name = text.split("=", 1)[0].strip()
    return name.replace("_", "-") if name.startswith("--") else name


class Refused:
    """Flags that extra args may not have.

    Args:
        table: The flags in every spelling, by the reason.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._why = {flag: why for why, flags in table.items() for flag in flags.split()}
        short = (flag for flag in self._why if not flag.startswith("--"))
        self._short = sorted(short, key=len, reverse=True)

    def check(self, args: tuple[str, ...]) -> None:
        """Refuse what the orchestrator owns, in every spelling, and what no server could take.

        Raises:
            RefusedArgument: names the flag and the reason.
            InvalidRequest: too many, too long, or a control character.
        """
        if not all(map(is_encodable, args)):
            raise InvalidRequest.because(
                "llama_extra_args is not valid Unicode text", field="llama_extra_args"
            )
        if len(args) > MAX_TOKENS or sum(len(a.encode()) for a in args) > MAX_BYTES:
            raise InvalidRequest.because(
                f"llama_extra_args is too long: at most {MAX_TOKENS} tokens and {MAX_BYTES} bytes",
                field="llama_extra_args",
            )
        for number, token in enumerate(args):
            if holds_control(token):  # not shown: it may be a secret
                raise InvalidRequest.because(
                    f"llama_extra_args[{number}] holds a control character",
                    field="llama_extra_args",
                )
            for flag in self._readings(token):
                if why := self._why.get(flag):
                    raise RefusedArgument.because(
                        f"llama_extra_args: {flag} is refused: {why}", field="llama_extra_args"
                    )

    def _readings(self, token: str) -> tuple[str, ...]:
        """Every flag that somebody could mean by a token, the likeliest first.

        llama-server itself takes exact names, `_` for `-` in long ones, and no attached value: to
        refuse the rest costs nothing, and is answered before the running server is stopped for it.
        """
        if (name := flag_of(token)) is None:
            return ()
        name = name.lower().replace("_", "-")
        if (found := _WORD.match(name)) is None:
            return (name,)
        word, head = found[0], found[1]
        has_value = len(head) < len(name) and not name[len(head)].isspace() and head not in _LONGER
        shorter = filter(head.startswith, self._short) if has_value else ()
        return word, head, f"-{word}", f"-{head}", *shorter


def holds_control(text: str) -> bool:
    """Does it hold a control character (Unicode category Cc: C0, DEL, C1)?"""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def is_encodable(text: str) -> bool:
    """Is this text that an argv, a file and a JSON answer can carry?

    Half a surrogate pair, which JSON may hold as an escape, is not, nor is a byte of a file name
    that was never UTF-8 (PEP 383).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def named_paths(args: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (flag, path) for every file that these name; None for a flag that reaches further.

    A value that looks like a path is one, whatever the flag: the next llama-server has flags that
    are in no table of today. Several files are separated by commas, and may have a scale.
    """
    flag, is_file = "", False
    for token in args:
        value = token
        if not is_file and (name := flag_of(token)) is not None:
            flag, is_file = name, name in _FILES
            if name in _REACHING:
                yield name, None
            _, has_value, value = token.partition("=")
            if not has_value:
                continue
        if is_file:  # whatever it looks like
            paths = {value, *value.split(",")}
            yield from ((flag, path) for path in sorted(paths | {p.split(":")[0] for p in paths}))
        elif value.lstrip().startswith(("/", "~", "./", "../")):
            yield flag, value
        is_file = False


def without(args: tuple[str, ...], flags: Iterable[str]) -> tuple[str, ...]:
    """Return `args` without these flags, and their values; `!` marks one that takes none."""
    owned = {flag.rstrip("!"): not flag.endswith("!") for flag in flags}
    kept: list[str] = []
    tokens = list(args)
    while tokens:
        token = tokens.pop(0)
        name = flag_of(token)
        if name not in owned:
            kept.append(token)
            continue
        takes_value = owned[name] and "=" not in token
        if takes_value and tokens and flag_of(tokens[0]) is None:
            tokens.pop(0)
    return tuple(kept)


def normal_cache_type(value: str | None) -> str | None:
    if value is None:
        return None
    if (name := value.lower()) not in CACHE_TYPES:
        raise InvalidRequest.because(
            f"cache_type_kv is {value[:40]!r}: use one of {', '.join(CACHE_TYPES)}",
            field="cache_type_kv",
        )
    return name


def normal_speculative_type(value: str | None) -> str | None:
    if value is None:
        return None
    name = value.lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9_,-]*", name):
        raise InvalidRequest.because(
            f"speculative_type is {value[:40]!r}: use default, off, or a type the server lists",
            field="speculative_type",
        )
    return OFF if name == "none" else name


_NGRAM_MOD: Final = (
    "--spec-ngram-mod-n-match 24 --spec-ngram-mod-n-min 48 --spec-ngram-mod-n-max 64"
)

# value -> the flags that mean it, the first that the binary supports
SPECULATIVE: Final[dict[str, tuple[str, ...]]] = {
    "default": ("--spec-default",),
    "ngram-mod": (
        "--spec-type ngram-mod " + _NGRAM_MOD,
        "--spec-type ngram-mod --spec-ngram-size-n 24 --draft-min 48 --draft-max 64",
    ),
    "ngram-simple": ("--spec-type ngram-simple",),
}


def names_modes(extra_args: tuple[str, ...]) -> bool:
    """Do these flags name the drafting modes themselves?"""
    return any(flag_of(token) in {"--spec-type", "--spec-default"} for token in extra_args)


def manual_mode(extra_args: tuple[str, ...]) -> str:
    """Return the drafting mode that these flags make, in the words of `speculative_type`.

    Several add up, separated by commas; a draft model alone is `draft`.
    """
    modes: list[str] = []
    for token, following in pairwise((*extra_args, "")):
        match flag_of(token):
            case "--spec-default":
                modes.append("default")
            case "--spec-type":
                value = token.partition("=")[2] if "=" in token else following
                modes += (mode.strip().lower() for mode in value.split(","))
    named = [mode for mode in dict.fromkeys(modes) if mode not in {"", "none"}]
    has_draft_model = any(flag_of(token) in _DRAFT_MODEL for token in extra_args)
    return ",".join(named) or ("draft" if has_draft_model and not modes else OFF)


def speculative_flags(
    mode: str | None, extra_args: tuple[str, ...], catalogue: Catalogue | None = None
) -> tuple[str, ...]:
    """Return the managed flags of a mode, by what the binary says it can do.

    Explicit drafting in the extra args makes them stand back, because spec types accumulate and
    a later flag cannot undo an earlier one. A binary that could not be asked gets today's names.

    Raises:
        InvalidRequest: this binary does not know the mode; the message lists what it accepts.
    """
    if mode is None or names_modes(extra_args):
        return ()
    if flags := _flags_of(mode, catalogue):
        return flags
    raise InvalidRequest.because(
        f"speculative_type {mode!r} is not supported by this llama-server; it accepts "
        f"{', '.join(accepted_modes(catalogue))}",
        field="speculative_type",
    )


def _flags_of(mode: str, catalogue: Catalogue | None) -> tuple[str, ...]:
    """Return the first spelling of a mode that the binary supports; () if there is none."""
    for spelling in SPECULATIVE.get(mode, (f"--spec-type {mode}",)):
        flags = tuple(spelling.split())
        if catalogue is None or _is_supported(flags, catalogue):
            return flags
    return ()


def _is_supported(flags: tuple[str, ...], catalogue: Catalogue) -> bool:
    names = [flag for flag in flags if flag.startswith("--")]
    listed = catalogue.get("--spec-type")
    value = flags[flags.index("--spec-type") + 1] if "--spec-type" in flags else None
    wanted = value.split(",") if value else []
    known = not wanted or (listed is not None and set(wanted) <= set(listed.choices or wanted))
    return catalogue.has(*names) and known


def accepted_modes(catalogue: Catalogue | None) -> list[str]:
    """Return every `speculative_type` that the binary can do, `off` first."""
    listed = catalogue.get("--spec-type") if catalogue is not None else None
    modes = dict.fromkeys((*SPECULATIVE, *(listed.choices if listed else ())))
    return [OFF, *(mode for mode in modes if mode != "none" and _flags_of(mode, catalogue))]
