"""Requests, model files and targets for tests of settings; nothing is on disk.

The tables of flags are written down here a second time, from the record of what llama-server
accepts, so that a flag dropped from the library's own table by accident is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from hypothesis import settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.server.slot import Slot
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target

SECRET: Final = "hf_doNotShowThisToken"

repeatable: Final = settings(derandomize=True, deadline=None, max_examples=150)
ANY_TEXT: Final = st.text(st.characters(), max_size=12)
PADDING: Final = st.text(st.sampled_from(" \u00a0\u2003"), max_size=2)
SLOT: Final = cast("Slot", SimpleNamespace(token="SLOT=token"))
"""What `child_environment` reads of a slot."""


def refusal(call: Callable[[], object]) -> InvalidRequest | None:
    """Return the error of a call; any other exception fails the test."""
    try:
        call()
    except InvalidRequest as error:
        return error
    return None


def file(path: str, **changes: int) -> FileIdentity:
    values = {"device": 1, "inode": 2, "size_bytes": 3, "mtime_ns": 4, **changes}
    return FileIdentity(path, **values)


PROJECTOR: Final = file("/models/mmproj.gguf")
BINARY: Final = ServerBinary("external", ("/bin/llama-server",), file("/bin/llama-server"))


def request(**values: Any) -> LoadRequest:
    return LoadRequest.from_dict({"model_path": "/models/a.gguf", **values})


def local(
    *paths: str, variant: str | None = "Q4_K_M", projector: FileIdentity | None = None
) -> ModelFiles:
    return ModelFiles(tuple(map(file, paths or ("/models/a.gguf",))), projector, variant)


def on_hub(repo: str = "org/a", variant: str = "Q8_0", commit: str = "a" * 40) -> ModelFiles:
    """A Hub model in the cache."""
    files = (file(f"/cache/{repo}/{commit}/{variant}.gguf"),)
    return ModelFiles(files, None, variant, HubModel(repo, None, commit))


def not_downloaded(variant: str | None = None, revision: str | None = None) -> ModelFiles:
    """A Hub model that is neither in the cache nor resolved."""
    return ModelFiles((), None, variant, HubModel("ORG/A", revision))


def target(made: LoadRequest | None = None, /, **values: Any) -> Target:
    """Return a target; `model` and `server` replace the defaults, the rest are request fields."""
    model, server = values.pop("model", local()), values.pop("server", BINARY)
    return Target(made or request(**values), model, server)


_TEXT: Final = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
_MAYBE: Final = st.none() | _TEXT
REQUESTS: Final = st.fixed_dictionaries(
    {"model_path": _TEXT.filter(lambda t: bool(t.strip()))},
    optional={
        "gguf_variant": _MAYBE,
        "revision": _MAYBE,
        "hf_token": _MAYBE,
        "max_seq_length": st.integers(0, 1 << 20),
        "cache_type_kv": st.none() | st.sampled_from(["", " F16", "q8_0", "Q4_1 "]),
        "speculative_type": st.none() | st.sampled_from(["", "off", "Default", "ngram-simple"]),
        "chat_template_override": _MAYBE,
        "llama_extra_args": st.none()
        | st.lists(st.sampled_from(["--temp", "0.5", "-1", "-c", "4096", "--jinja", "x"])),
        "mmproj_path": _MAYBE,
        "n_parallel": st.none() | st.integers(1, 64),
        "force_reload": st.booleans(),
        "on_busy": st.sampled_from(["supersede", "queue", "reject"]),
        "load_request_id": st.none()
        | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,9}", fullmatch=True),
        "prefetch": st.booleans(),
        "restore_previous": st.booleans(),
        "idle_ttl_s": st.none() | st.floats(0.001, 1000),
        "pinned": st.booleans(),
        "stall_timeout_s": st.floats(0.001, 1000) | st.integers(1, 1000),
        "deadline_s": st.none() | st.floats(0.001, 1000),
        "kind": st.sampled_from(["chat", "embedding", "RERANK "]),
        "cache_ram_mib": st.none() | st.integers(0, 1 << 20),
    },
)
"""Fields of valid requests."""


_REFUSED: Final = """
    -m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hfv -hfrv
    --hf-repo-v -hffv --hf-file-v -hft --hf-token -mm --mmproj -mmu --mmproj-url -a --alias
    --host --port --path --api-prefix --reuse-port
    --api-key --api-key-file --ssl-key-file --ssl-cert-file
    --webui --no-webui --ui --no-ui --ui-config --webui-config --ui-config-file
    --webui-config-file --ui-mcp-proxy --no-ui-mcp-proxy --webui-mcp-proxy --no-webui-mcp-proxy
    --models-dir --models-preset --models-max --models-autoload --no-models-autoload
    --tools --tools-runtime -ag --agent -no-ag --no-agent --mcp-servers-config --mcp-servers-json
    --cors-origins --cors-methods --cors-headers --cors-credentials --no-cors-credentials
    --media-path --slot-save-path --log-file --log-disable --log-prompts-dir -lcd
    --lookup-cache-dynamic --prompt-cache -o --output --output-file --logits-output-dir
    --video-ffmpeg-dir
    --embedding --embeddings --rerank --reranking --pooling -h --help --usage --version
    --list-devices -cl --cache-list --completion-bash
    --embd-gemma-default --embd-bge-small-en-default --embd-e5-small-en-default
    --embd-gte-small-default --fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default
    --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default
    --gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
    -np --parallel --n-parallel
"""
REFUSED_FLAGS: Final = _REFUSED.split()

SHADOWED_FLAGS: Final = {
    "max_seq_length": "-c --ctx-size",
    "cache_type_kv": "-ctk --cache-type-k -ctv --cache-type-v",
    "speculative_type": (
        "--spec-default! --spec-type --spec-ngram-size-n --spec-ngram-size --draft-min --draft-max "
        "--spec-ngram-mod-n-match --spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-draft-n-max "
        "--spec-draft-n-min --spec-draft-p-min --spec-draft-p-split -md --model-draft "
        "--spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf "
        "--draft --draft-n --draft-n-min --draft-p-min --draft-p-split"
    ),
    "chat_template_override": (
        "--chat-template --chat-template-file --chat-template-kwargs --jinja! --no-jinja!"
    ),
    "cache_ram_mib": "-cram --cache-ram",
}
SHADOWS: Final = [
    (field, flag.rstrip("!"), not flag.endswith("!"))
    for field, flags in SHADOWED_FLAGS.items()
    for flag in flags.split()
]
"""Field, flag, and whether the flag takes a value."""

_WORDS: Final = ["value", "-1", "4096", "--temp", "--mlock", "-t", "-t=4", "--seed", "x=y", "-"]
TOKENS: Final = st.sampled_from(
    [*_WORDS, *(f for _, f, _ in SHADOWS), *(f"{f}=v" for _, f, _ in SHADOWS)]
)

_VALUES: Final = ["v", "-1", "-.5", "4096", "/t.jinja", '{"a": "--temp"}', "a=b", "-", "", "-inf"]
FIELD_OF: Final = {flag: field for field, flag, _ in SHADOWS}
_BOOLEAN: Final = {flag for _, flag, takes_value in SHADOWS if not takes_value}
_OTHER_FLAGS: Final = (
    "--temp",
    "-t",
    "-C",
    "-ctkd",
    "--spec-draft-ngl",
    "--jinja-like",
    "--spec-synth",
)

FIELDS: Final = st.fixed_dictionaries(
    {},
    optional={
        "max_seq_length": st.sampled_from([0, 256, 4096]),
        "cache_type_kv": st.sampled_from([None, "", "q8_0", "F16"]),
        "speculative_type": st.sampled_from([None, "off", "", "default", "ngram-mod"]),
        "n_parallel": st.sampled_from([None, 1, 4]),
        "chat_template_override": st.sampled_from([None, " ", "{{ x }}"]),
    },
)
"""Values of some fields, as callers write them."""


class Written(NamedTuple):
    """One flag with its value as tokens, and a stray token behind it."""

    flag: str
    tokens: tuple[str, ...]
    stray: tuple[str, ...] = ()


@st.composite
def written(draw: st.DrawFn) -> Written:
    """Draw a flag as a caller writes it: alone, with its value, or both in one token."""
    flag = draw(st.sampled_from(list(FIELD_OF)) | st.sampled_from(_OTHER_FLAGS))
    value = draw(st.sampled_from(_VALUES))
    spelled = flag
    if flag.startswith("--") and draw(st.booleans()):
        spelled = "--" + flag[2:].replace("-", "_")
    stray = tuple(draw(st.lists(st.sampled_from(_VALUES), max_size=1)))
    if flag in _BOOLEAN:
        return Written(flag, (draw(PADDING) + spelled,), stray)
    if draw(st.booleans()) and draw(st.booleans()):
        return Written(flag, (spelled,))
    return Written(flag, draw(st.sampled_from([(f"{spelled}={value}",), (spelled, value)])), stray)


def flat(written: list[Written]) -> tuple[str, ...]:
    return tuple(token for setting in written for token in (*setting.tokens, *setting.stray))
