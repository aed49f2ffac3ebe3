"""The flags of the embedded server: their values, what each one sets, and `--help`.

Loaded by embedded.py, in a process that imports nothing else of this package. A flag is honoured
or refused, never accepted and ignored; refusals have llama-server's words.
"""
# ruff: noqa: E501 -- the flag tables have one row per flag

from __future__ import annotations

import contextlib
import enum
import functools
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

INT32_MAX = 2**31 - 1
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_SPEC_TYPES = (
    *("none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark"),
    *("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"),
)
_LOAD_MODES = ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
_SWITCH = dict.fromkeys(("on", "enabled", "true", "1"), True)
_SWITCH |= dict.fromkeys(("off", "disabled", "false", "0"), False)


# Readers of values. The text of a ValueError is llama-server's.

Reader = Callable[[Any], Any]


def _checked(read: Reader, is_valid: Callable[[Any], object], refusal: str) -> Reader:
    def checked(text: str) -> Any:
        if not is_valid(value := read(text)):
            raise ValueError(refusal)
        return value

    return checked


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text) or not -INT32_MAX <= int(text) <= INT32_MAX:
        raise ValueError("stoi")
    return int(text)


def _between(low: int, high: int, name: str) -> Reader:
    refusal = f"{name} must be between {low} and {high} inclusive"
    return _checked(_integer, lambda number: low <= number <= high, refusal)


def _threads(text: str) -> int:
    return number if (number := _integer(text)) > 0 else os.cpu_count() or 1


def _layers(text: str) -> int:
    return {"auto": -1, "all": -2}.get(text) or _integer(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"-1|\+?[0-9]+", text) or int(text) >= 2**32:
        raise ValueError("stoul")
    return int(text) % 2**32


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError("stof")


def _choice(values: dict[str, Any], refusal: str = "invalid value") -> Reader:
    def read(text: str) -> Any:
        if text not in values:
            raise ValueError(refusal.format(text))
        return values[text]

    return read


def _members(prefix: str, *names: str) -> dict[str, str]:
    return {name: prefix + name.upper().replace("+", "_") for name in names}


def _spec_types(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _SPEC_TYPES:
            raise ValueError(f"unknown speculative type: {name}")
    return ["none"] if "none" in names else names


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"error: failed to open file '{path}'\n") from error


def _keys(path: str) -> list[str]:
    lines = [line.strip() for line in _file(path).splitlines() if not line.startswith("#")]
    if not any(lines):  # llama-server would require no key
        raise ValueError(f"error: no API key in file '{path}'\n")
    return [line for line in lines if line]


def _json_items(text: str) -> dict[str, str]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ValueError(f"parse error: {error}") from error
    if not isinstance(items, dict):
        raise ValueError("parse error: not a JSON object")  # noqa: TRY004 -- as every reader
    return {name: json.dumps(value, ensure_ascii=False) for name, value in items.items()}


_size = _between(1, INT32_MAX, "size")
_size_or_0 = _between(0, INT32_MAX, "size")
_port = _between(0, 65535, "port")
_n_match = _between(1, 1024, "ngram size N")
_n_min = _between(0, 1024, "ngram n-min")
_n_max = _between(0, 1024, "ngram n-max")
_slots = _checked(_integer, bool, "error: invalid value for n_parallel\n")
_penalty = _checked(
    _number, lambda n: n > 0, "error: repeat-penalty must be finite and greater than 0\n"
)
_hosts = _checked(words, bool, "--host requires at least one address")
_fit = _choice(_SWITCH, "error: unknown value for --fit: '{}'\n")
_flash = _choice(
    {word: f"LLAMA_FLASH_ATTN_TYPE_{'EN' if on else 'DIS'}ABLED" for word, on in _SWITCH.items()}
    | dict.fromkeys(("auto", "-1"), "LLAMA_FLASH_ATTN_TYPE_AUTO"),
    "error: unknown value for --flash-attn: '{}'\n",
)
_kv_type = _choice(_members("GGML_TYPE_", *_CACHE_TYPES), "Unsupported cache type: {}")
_load = _choice(_members("LLAMA_LOAD_MODE_", *_LOAD_MODES) | {"dio": "LLAMA_LOAD_MODE_DIRECT_IO"})
_pooling = _choice(_members("LLAMA_POOLING_TYPE_", "none", "mean", "cls", "last", "rank"))


# Setters of CommonParams.


def assign(params: Any, path: str, value: Any) -> None:
    """Set the field at a dotted path; for an enum field, by its member's name."""
    *parents, field = path.split(".")
    owner = functools.reduce(getattr, parents, params)
    if isinstance(current := getattr(owner, field), enum.Enum):
        value = type(current)[value]
    setattr(owner, field, value)
    if parents == ["sampling"]:
        from xllamacpp import common_params_sampling_config as pins

        # Without the pin, the model's `general.sampling.*` metadata would win over the flag.
        pin = pins.__members__.get(f"COMMON_PARAMS_SAMPLING_CONFIG_{field.upper()}", 0)
        owner.user_sampling_config |= int(pin)


def _context(params: Any, n_ctx: int) -> None:
    params.n_ctx = n_ctx
    if n_ctx == 0:
        params.fit_params_min_ctx = -1  # an explicit 0 is never shrunk to fit the memory


def _verbose(params: Any, _on: bool) -> None:
    params.verbosity = INT32_MAX


def _mmap(params: Any, wanted: bool) -> None:
    lock = "MLOCK" in params.load_mode.name
    mode = ("MMAP_MLOCK" if lock else "MMAP") if wanted else ("MLOCK" if lock else "NONE")
    assign(params, "load_mode", f"LLAMA_LOAD_MODE_{mode}")


def _mlock(params: Any, _on: bool) -> None:
    unmapped = params.load_mode.name in {"LLAMA_LOAD_MODE_NONE", "LLAMA_LOAD_MODE_MLOCK"}
    assign(params, "load_mode", f"LLAMA_LOAD_MODE_{'MLOCK' if unmapped else 'MMAP_MLOCK'}")


def _rerank(params: Any, _on: bool) -> None:
    params.embedding = True
    assign(params, "pooling_type", "LLAMA_POOLING_TYPE_RANK")


def _offload(params: Any, n_layers: int) -> None:
    from xllamacpp import get_device_info

    params.n_gpu_layers = n_layers
    if n_layers and not any(device["type"].name.endswith("GPU") for device in get_device_info()):
        sys.stderr.write("warning: no usable GPU found, --gpu-layers option will be ignored\n")


def _allow(params: Any, keys: Iterable[str]) -> None:
    params.api_keys = [*params.api_keys, *keys]


def _speculate(params: Any, names: Iterable[str]) -> None:
    types = params.speculative.types
    members = (f"COMMON_SPECULATIVE_TYPE_{name.replace('-', '_').upper()}" for name in names)
    params.speculative.types = [*types, *(type(types[0])[member] for member in members)]


def _speculate_by_default(params: Any, _on: bool) -> None:
    _speculate(params, ["ngram-mod"])
    mod = params.speculative.ngram_mod
    mod.n_match, mod.n_min, mod.n_max = 24, 48, 64


class Flag(NamedTuple):
    """One row of a table.

    Attributes:
        names: Its spellings; those after `|` mean "no".
        value: Placeholder of the value; "" for a boolean, which takes none.
        into: A field of `CommonParams`, or a setter.
    """

    names: str
    value: str
    read: Reader
    into: str | Callable[[Any, Any], None]
    help: str

    def spellings(self) -> dict[str, bool]:
        """Return every spelling in order, with the value it has for a boolean."""
        yes, _, no = self.names.partition("|")
        return dict.fromkeys(yes.split(), True) | dict.fromkeys(no.split(), False)

    def value_of(self, name: str, words: Iterator[str]) -> Any:
        """Return the value of this flag under this spelling, taking it from `words`."""
        if not self.value:
            return self.spellings()[name]
        if (text := next(words, None)) is None:
            raise ValueError("expected value for argument")
        return self.read(text)


# fmt: off
_SPECS = ",".join(_SPEC_TYPES)
_KV_HELP = f"allowed values: {', '.join(_CACHE_TYPES)}\n(default: f16)"
FLAGS = {
    "common params": (
        Flag("-h --help --usage",                              "",                    bool,        "help",                           "print usage and exit"),
        Flag("--version",                                      "",                    bool,        "version",                        "show version and build info"),
        Flag("--list-devices",                                 "",                    bool,        "list-devices",                   "print list of available devices and exit"),
        Flag("-t --threads",                                   "N",                   _threads,    "cpuparams.n_threads",            "number of CPU threads to use during generation (default: -1)"),
        Flag("-tb --threads-batch",                            "N",                   _threads,    "cpuparams_batch.n_threads",      "number of threads for batch and prompt processing (default: same as --threads)"),
        Flag("-c --ctx-size",                                  "N",                   _size_or_0,  _context,                         "size of the prompt context (default: 0, 0 = loaded from model)"),
        Flag("-n --predict --n-predict",                       "N",                   _integer,    "n_predict",                      "number of tokens to predict (default: -1, -1 = infinity)"),
        Flag("-b --batch-size",                                "N",                   _size,       "n_batch",                        "logical maximum batch size (default: 2048)"),
        Flag("-ub --ubatch-size",                              "N",                   _size_or_0,  "n_ubatch",                       "physical maximum batch size (default: 512)"),
        Flag("-fa --flash-attn",                               "[on|off|auto]",       _flash,      "flash_attn_type",                "set Flash Attention use ('on', 'off', or 'auto', default: 'auto')"),
        Flag("-ctk --cache-type-k",                            "TYPE",                _kv_type,    "cache_type_k",                   f"KV cache data type for K\n{_KV_HELP}"),
        Flag("-ctv --cache-type-v",                            "TYPE",                _kv_type,    "cache_type_v",                   f"KV cache data type for V\n{_KV_HELP}"),
        Flag("-lm --load-mode",                                "MODE",                _load,       "load_mode",                      f"model loading mode\nallowed values: {', '.join(_LOAD_MODES)}\n(default: auto)"),
        Flag("--mlock",                                        "",                    bool,        _mlock,                           "force system to keep model in RAM rather than swapping or compressing"),
        Flag("--mmap | --no-mmap",                             "",                    bool,        _mmap,                            "whether to memory-map the model (default: enabled unless a device refuses)"),
        Flag("-ngl --gpu-layers --n-gpu-layers",               "N",                   _layers,     _offload,                         "max. number of layers to store in VRAM: a number, 'auto' or 'all' (default: auto)"),
        Flag("-fit --fit",                                     "[on|off]",            _fit,        "fit_params",                     "adjust unset arguments to fit in device memory ('on' or 'off', default: 'on')"),
        Flag("-m --model",                                     "FNAME",               str,         "model.path",                     "model path to load"),
        Flag("-v --verbose --log-verbose",                     "",                    bool,        _verbose,                         "set verbosity level to infinity (i.e. log all messages, useful for debugging)"),
    ),
    "sampling params": (
        Flag("-s --seed",                                      "SEED",                _seed,       "sampling.seed",                  "RNG seed (default: -1, use random seed for -1)"),
        Flag("--temp --temperature",                           "N",                   _number,     "sampling.temp",                  "temperature (default: 0.80)"),
        Flag("--top-k",                                        "N",                   _integer,    "sampling.top_k",                 "top-k sampling (default: 40, 0 = disabled)"),
        Flag("--top-p",                                        "N",                   _number,     "sampling.top_p",                 "top-p sampling (default: 0.95, 1.0 = disabled)"),
        Flag("--min-p",                                        "N",                   _number,     "sampling.min_p",                 "min-p sampling (default: 0.05, 0.0 = disabled)"),
        Flag("--repeat-last-n",                                "N",                   _integer,    "sampling.penalty_last_n",        "last n tokens to consider for penalize (default: 64, 0 = disabled)"),
        Flag("--repeat-penalty",                               "N",                   _penalty,    "sampling.penalty_repeat",        "penalize repeat sequence of tokens (default: 1.00, 1.0 = disabled)"),
        Flag("--presence-penalty",                             "N",                   _number,     "sampling.penalty_present",       "repeat alpha presence penalty (default: 0.00, 0.0 = disabled)"),
        Flag("--frequency-penalty",                            "N",                   _number,     "sampling.penalty_freq",          "repeat alpha frequency penalty (default: 0.00, 0.0 = disabled)"),
    ),
    "speculative params": (
        Flag("--spec-draft-n-max",                             "N",                   _integer,    "speculative.draft.n_max",        "number of tokens to draft for speculative decoding (default: 3)"),
        Flag("--spec-draft-n-min",                             "N",                   _integer,    "speculative.draft.n_min",        "minimum number of draft tokens to use (default: 0)"),
        Flag("--spec-draft-p-min --draft-p-min",               "P",                   _number,     "speculative.draft.p_min",        "minimum speculative decoding probability (greedy) (default: 0.00)"),
        Flag("--spec-draft-model -md --model-draft",           "FNAME",               str,         "speculative.draft.mparams.path", "draft model for speculative decoding (default: unused)"),
        Flag("--spec-type",                                    _SPECS,                _spec_types, _speculate,                       "comma-separated list of types of speculative decoding to use (default: none)"),
        Flag("--spec-ngram-mod-n-min",                         "N",                   _n_min,      "speculative.ngram_mod.n_min",    "minimum number of ngram tokens to use (default: 48)"),
        Flag("--spec-ngram-mod-n-max",                         "N",                   _n_max,      "speculative.ngram_mod.n_max",    "maximum number of ngram tokens to use (default: 64)"),
        Flag("--spec-ngram-mod-n-match",                       "N",                   _n_match,    "speculative.ngram_mod.n_match",  "ngram-mod lookup length (default: 24)"),
    ),
    "example-specific params": (
        Flag("-cram --cache-ram",                              "N",                   _integer,    "cache_ram_mib",                  "set the maximum cache size in MiB (default: 8192, -1 - no limit, 0 - disable)"),
        Flag("--embedding --embeddings",                       "",                    bool,        "embedding",                      "restrict to only support embedding use case; use only with dedicated embedding models (default: disabled)"),
        Flag("--rerank --reranking",                           "",                    bool,        _rerank,                          "enable reranking endpoint on server (default: disabled)"),
        Flag("--pooling",                                      "{none,mean,cls,last,rank}", _pooling, "pooling_type",                "pooling type for embeddings, use model default if unspecified"),
        Flag("--warmup | --no-warmup",                         "",                    bool,        "warmup",                         "whether to perform warmup with an empty run (default: enabled)"),
        Flag("-np --parallel",                                 "N",                   _slots,      "n_parallel",                     "number of server slots (default: -1, -1 = auto)"),
        Flag("-cb --cont-batching | -nocb --no-cont-batching", "",                    bool,        "cont_batching",                  "whether to enable continuous batching (default: enabled)"),
        Flag("-mm --mmproj",                                   "FILE",                str,         "mmproj.path",                    "path to a multimodal projector file"),
        Flag("-a --alias",                                     "STRING",              words,      "model_alias",                    "set model name aliases, comma-separated (to be used by API)"),
        Flag("--host",                                         "HOST",                _hosts,      "hostnames",                      "addresses to listen on, comma-separated (default: 127.0.0.1)"),
        Flag("--port",                                         "PORT",                _port,       "port",                           "port to listen (default: 8080, 0 = any free port)"),
        Flag("--api-key-file",                                 "FNAME",               _keys,       _allow,                           "path to file containing API keys, one per line; lines starting with a hash are treated as comments (default: none)\n(keys also from env: LLAMA_API_KEY)"),
        Flag("--chat-template-kwargs",                         "STRING",              _json_items, "default_template_kwargs",        """sets additional params for the json template parser, must be a valid json object string, e.g. '{"key1":"value1","key2":"value2"}'"""),
        Flag("--metrics",                                      "",                    bool,        "endpoint_metrics",               "enable prometheus compatible metrics endpoint (default: disabled)"),
        Flag("--props",                                        "",                    bool,        "endpoint_props",                 "enable changing global properties via POST /props (default: disabled)"),
        Flag("--slots | --no-slots",                           "",                    bool,        "endpoint_slots",                 "expose slots monitoring endpoint (default: enabled)"),
        Flag("--jinja | --no-jinja",                           "",                    bool,        "use_jinja",                      "whether to use jinja template engine for chat (default: enabled)"),
        Flag("--chat-template",                                "JINJA_TEMPLATE",      str,         "chat_template",                  "set custom jinja chat template (default: the model's own)"),
        Flag("--chat-template-file",                           "JINJA_TEMPLATE_FILE", _file,       "chat_template",                  "set custom jinja chat template file (default: the model's own)"),
        Flag("--spec-default",                                 "",                    bool,        _speculate_by_default,            "enable default speculative decoding config"),
    ),
}
# fmt: on
BY_NAME = {name: flag for rows in FLAGS.values() for flag in rows for name in flag.spellings()}


def usage_of(flag: Flag) -> str:
    """Return the flag's entry of --help, in llama-server's columns of 40 and 70 characters."""
    first, *rest = flag.spellings()
    left = f"{first + ',':<6} {', '.join(rest)}" if rest else first
    left = f"{left} {flag.value}".rstrip()
    wrap = functools.partial(
        textwrap.wrap, width=70, break_long_words=False, break_on_hyphens=False
    )
    lines = [line for text in flag.help.splitlines() for line in wrap(text)]
    if len(left) > 37:
        lines.insert(0, "")
    return "\n".join([f"{left:<40}{lines[0]}".rstrip(), *(f"{'':40}{line}" for line in lines[1:])])


def usage() -> str:
    """Return what --help prints."""
    sections = (
        f"----- {title} -----\n\n" + "\n".join(map(usage_of, flags))
        for title, flags in FLAGS.items()
    )
    return "\n\n\n".join(sections) + "\n"
