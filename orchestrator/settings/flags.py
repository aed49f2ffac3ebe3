"""llama-server's flags: how a token is read, and which flags extra args may not contain.

A flag counts as the same in every spelling that llama-server accepts; a refused flag is refused in
every spelling that a caller could mean it by. Only this module, reach.py, drafting.py, argv.py,
resources.py and the rows of fields.py contain names of flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from orchestrator.errors import InvalidRequest, RefusedArgument

CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

# Reasons, and flags with every alias; fields.py adds the flags that a field replaces. Their
# environment variables never reach the server, see server/environment.py.
_REFUSED: Final = """
use the field model_path instead:
    -m --model -hf -hfr --hf-repo
use the field gguf_variant instead:
    -hff --hf-file
use the field hf_token instead:
    -hft --hf-token
model_path takes a file, a folder or a Hub repo:
    -mu --model-url -dr --docker-repo -hfv -hfrv --hf-repo-v -hffv --hf-file-v
the model's name in answers is that of model_path:
    -a --alias
the orchestrator sets the server's address:
    --host --port --path --api-prefix --reuse-port
the orchestrator sets keys and TLS:
    --api-key --api-key-file --ssl-key-file --ssl-cert-file
the server's web UI is always off:
    --webui --no-webui --ui --no-ui --ui-config --webui-config --ui-config-file
    --webui-config-file --ui-mcp-proxy --no-ui-mcp-proxy --webui-mcp-proxy --no-webui-mcp-proxy
router mode is not supported:
    --models-dir --models-preset --models-max --models-autoload --no-models-autoload
server-side tools run code on this machine:
    --tools --tools-runtime -ag --agent -no-ag --no-agent --mcp-servers-config --mcp-servers-json
the orchestrator sets the CORS rules:
    --cors-origins --cors-methods --cors-headers --cors-credentials --no-cors-credentials
it writes files:
    --slot-save-path --log-file --log-prompts-dir -lcd --lookup-cache-dynamic --prompt-cache
    -o --output --output-file --logits-output-dir
it runs the programs of a folder:
    --video-ffmpeg-dir
the pass-through would read any file of this folder to anybody:
    --media-path
the orchestrator reads the log:
    --log-disable
the server would print and exit:
    -h --help --usage --version --list-devices -cl --cache-list --completion-bash
it sets a model and a port of its own:
    --embd-gemma-default --embd-bge-small-en-default --embd-e5-small-en-default
    --embd-gte-small-default --fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default
    --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default
    --gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
"""
REFUSED: Final = dict(re.findall(r"^(\S.*):\n((?: .*\n)+)", _REFUSED, re.MULTILINE))
_LONGER: Final = frozenset({"-md", "-mg", "-mmdev", "-hfd", "-hfrd"})  # begin like a refused one

MAX_TOKENS: Final = 256
MAX_BYTES: Final = 32 * 1024
NUMBER: Final = re.compile(
    r"[-+]?((\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?|inf(inity)?|nan)", re.ASCII | re.IGNORECASE
)
_WORD: Final = re.compile(r"(--?[a-z][a-z-]*)[a-z0-9.-]*")


def flag_of(token: str) -> str | None:
    """Return the flag that a token names, in llama-server's own spelling, or None for a value.

    `--flag=value`, underscores and padding name the same flag; negative numbers are values.
    """
    text = token.strip()
    if not text.startswith("-") or text in {"-", "--"} or NUMBER.fullmatch(text):
        return None
    name = text.partition("=")[0].strip()
    return name.replace("_", "-") if name.startswith("--") else name


class RefusedFlags:
    """Flags that extra args may not contain.

    Args:
        table: Flags in every spelling, by the reason.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._reasons = {flag: reason for reason, flags in table.items() for flag in flags.split()}
        short = (flag for flag in self._reasons if not flag.startswith("--"))
        self._short = sorted(short, reverse=True)  # the longest of those that begin a token first

    def check(self, args: tuple[str, ...]) -> None:
        """Refuse flags of the table, and what no server could accept.

        Raises:
            RefusedArgument: names the flag and the reason.
            InvalidRequest: too many or too long, a control character, or not Unicode.
        """
        if not all(map(is_encodable, args)):
            raise _invalid("llama_extra_args is not valid Unicode text")
        if len(args) > MAX_TOKENS or sum(len(a.encode()) for a in args) > MAX_BYTES:
            raise _invalid(
                f"llama_extra_args is too long: at most {MAX_TOKENS} tokens and {MAX_BYTES} bytes"
            )
        for number, token in enumerate(args):
            if has_control_character(token):  # the token is not shown: it may be a secret
                raise _invalid(f"llama_extra_args[{number}] contains a control character")
            for flag in self._readings(token):
                if reason := self._reasons.get(flag):
                    raise RefusedArgument.because(
                        f"{flag} is refused in llama_extra_args: {reason}", field="llama_extra_args"
                    )

    def _readings(self, token: str) -> tuple[str, ...]:
        """Return every flag that a caller could mean by a token, the likeliest first.

        llama-server itself accepts exact names, `_` for `-` in long ones, and no attached value.
        Refusing the rest costs nothing, and saves stopping the running server for a typing error.
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


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest.because(message, field="llama_extra_args")


def has_control_character(text: str) -> bool:
    """Return whether text contains a character of Unicode category Cc (C0, DEL, C1)."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def is_encodable(text: str) -> bool:
    """Return whether an argv, a file and a JSON answer can carry this text.

    A lone surrogate, which JSON may contain as an escape, cannot be encoded, nor can a file name
    that is not UTF-8 (PEP 383).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def value_of(args: Sequence[str], *flags: str) -> str | None:
    """Return the value of the last of these flags in `args`, as llama-server does; None if none of
    them is there.
    """
    given = [value for token, value in pairwise(args) if flag_of(token) in flags]
    return given[-1] if given else None


def without(args: tuple[str, ...], flags: Iterable[str]) -> tuple[str, ...]:
    """Return `args` without these flags and their values; `!` marks a flag that takes no value."""
    takes_value = {flag.removesuffix("!"): not flag.endswith("!") for flag in flags}
    kept: list[str] = []
    tokens = list(args)
    while tokens:
        token = tokens.pop(0)
        if (name := flag_of(token)) not in takes_value:
            kept.append(token)
        elif takes_value[name] and "=" not in token and tokens and flag_of(tokens[0]) is None:
            tokens.pop(0)
    return tuple(kept)
