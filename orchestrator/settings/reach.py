"""What flags of llama-server can reach, by its whole `--help`; flags.py has what writes or runs.

A flag in no list is of a newer build: one that looks like a file or an address counts as one, by
its name or by its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from orchestrator.settings.flags import NUMBER, flag_of

FILES: Final = (
    "-md --model-draft --spec-draft-model -mv --model-vocoder --lora --lora-scaled "
    "--control-vector --control-vector-scaled --grammar-file -jf --json-schema-file "
    "--chat-template-file -lcs --lookup-cache-static --tts-speaker-file -f --file -bf "
    "--binary-file -sysf --system-prompt-file --in-file --context-file --image --audio --video"
)
"""The server reads a file."""

MACHINES: Final = "-hfd -hfrd --hf-repo-draft --spec-draft-hf --rpc --server-base"
"""The server connects to other machines."""

HARMLESS: Final = """
    -t --threads -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb
    --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -c
    --ctx-size -n --predict --n-predict -b --batch-size -ub --ubatch-size --keep --swa-full -fa
    --flash-attn --perf --no-perf -e --escape --no-escape --rope-scaling --rope-scale
    --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor
    --yarn-beta-slow --yarn-beta-fast -kvo --kv-offload -nkvo --no-kv-offload --repack -nr
    --no-repack --no-host -ctk --cache-type-k -ctv --cache-type-v -dt --defrag-thold -lm
    --load-mode -lzm --lazy-mode --numa -dev --device -ot --override-tensor -cmoe --cpu-moe -ncmoe
    --n-cpu-moe -ncffn --n-cpu-ffn -ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts
    --tensor-split -mg --main-gpu -fit --fit -fitt --fit-target -fitc --fit-ctx --check-tensors
    --override-kv --op-offload --no-op-offload --control-vector-layer-range --log-jsonl
    --no-log-jsonl --log-colors -v --verbose --log-verbose --offline -lv --verbosity
    --log-verbosity --log-prefix --no-log-prefix --log-timestamps --no-log-timestamps
    --spec-draft-type-k -ctkd --cache-type-k-draft --spec-draft-type-v -ctvd --cache-type-v-draft
    --samplers -s --seed --sampler-seq --sampling-seq --ignore-eos --temp --temperature --top-k
    --top-p --min-p --top-nsigma --top-n-sigma --xtc-probability --xtc-threshold --typical
    --typical-p --repeat-last-n --repeat-penalty --presence-penalty --frequency-penalty
    --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker
    --adaptive-target --adaptive-decay --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr
    --mirostat-ent -l --logit-bias --grammar -j --json-schema -bs --backend-sampling
    --spec-draft-threads -td --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft
    --spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft
    --spec-draft-cpu-strict --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll
    --poll-draft --spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft
    --spec-draft-cpu-strict-batch --cpu-strict-batch-draft --spec-draft-prio-batch
    --prio-batch-draft --spec-draft-poll-batch --poll-batch-draft --spec-draft-override-tensor
    -otd --override-tensor-draft --spec-draft-cpu-moe -cmoed --cpu-moe-draft
    --spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft --spec-draft-n-max
    --spec-draft-n-min --spec-synth-len --spec-synth-rates --spec-draft-p-split --draft-p-split
    --spec-draft-p-min --draft-p-min --spec-draft-backend-sampling
    --no-spec-draft-backend-sampling --spec-draft-sampling --spec-draft-device -devd
    --device-draft --spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft --spec-type
    --spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match
    --spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits
    --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits
    --spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits --draft
    --draft-n --draft-max --draft-min --draft-n-min --spec-ngram-size-n --spec-ngram-size-m
    --spec-ngram-min-hits --kv-unified-per-slot -ctxcp --ctx-checkpoints --swa-checkpoints -cms
    --checkpoint-min-step -cram --cache-ram -kvu --kv-unified -no-kvu --no-kv-unified
    --cache-idle-slots --no-cache-idle-slots --context-shift --no-context-shift -r
    --reverse-prompt -sp --special --warmup --no-warmup --spm-infill -cb --cont-batching -nocb
    --no-cont-batching --mmproj-auto --no-mmproj --no-mmproj-auto --mmproj-offload
    --no-mmproj-offload -mmdev --mmproj-device --image-min-tokens --image-max-tokens
    --mtmd-batch-max-tokens --video-fps --video-timestamp-interval --tags --embd-normalize
    --chat-template-kwargs -to --timeout --sse-ping-interval --threads-http --cache-prompt
    --no-cache-prompt --cache-reuse --metrics --props --slots --no-slots --jinja --no-jinja
    --reasoning-format -rea --reasoning --reasoning-effort --reasoning-budget
    --reasoning-budget-message --reasoning-preserve --no-reasoning-preserve --chat-template
    --skip-chat-parsing --no-skip-chat-parsing --prefill-assistant --no-prefill-assistant -sps
    --slot-prompt-similarity --lora-init-without-apply --sleep-idle-seconds --spec-default --mlock
    --mmap --no-mmap
"""

_FILES, _MACHINES, _HARMLESS = (frozenset(t.split()) for t in (FILES, MACHINES, HARMLESS))
_NAME: Final = re.compile(
    r"(?<![a-z])(files?|paths?|dir|folder|ur[li]|host|servers?|addr(ess)?|endpoint|repo|hf|socket|"
    r"cache|output|save|dump|load|exec|command|script|plugin|config)(?![a-z])"
)
_WORD: Final = re.compile(r"[\w+-]*", re.ASCII)


def named_paths(args: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (flag, path) for every file that args name, and (flag, None) for other machines.

    Several files are separated by commas, and may have a scale.
    """
    for flag, value, is_file in _values(args):
        if value is None:
            if flag in _MACHINES:
                yield flag, None
        elif is_file or (flag not in _HARMLESS and _is_reaching(flag, value)):
            paths = {value, *value.split(",")}
            yield from ((flag, path) for path in sorted(paths | {p.split(":")[0] for p in paths}))


def named_files(args: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) for every flag that names a file which the server reads, or several."""
    for flag, value, is_file in _values(args):
        if value is not None and is_file:
            yield flag, value


def _is_reaching(flag: str, value: str) -> bool:
    if NUMBER.fullmatch(value.strip()):
        return False
    is_named = _NAME.search(flag) is not None or flag in _MACHINES
    return is_named or _WORD.fullmatch(value.strip()) is None


def _values(args: Iterable[str]) -> Iterator[tuple[str, str | None, bool]]:
    """Yield every flag with None, then its values, each with whether it is the flag's file."""
    flag, is_file = "", False
    for token in args:
        value = token
        if not is_file and (name := flag_of(token)) is not None:
            flag, is_file = name, name in _FILES
            yield flag, None, is_file
            _, has_value, value = token.partition("=")
            if not has_value:
                continue
        yield flag, value, is_file
        is_file = False
