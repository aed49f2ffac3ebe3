"""How people publish GGUF models: file names of fifty repositories, and the right answer for each.

Shapes, not contents: which quantisations, splits, folders, projectors, drafts, heads, adapters and
calibration files lie beside each other in public listings. `{a,b}` stands for each of them; a word
that has the same one twice takes the same choice for both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A repository.

    Attributes:
        repo: Its name.
        files: Its GGUF files, and others that look like them.
        default: The variant a load without one takes.
        weights: Its files, in order.
        projector: The projector loaded with it.
        set_aside: What is never a variant.
        variants: Other names that must mean something: the name, and the first file it means.
    """

    repo: str
    files: str
    default: str
    weights: str
    projector: str | None = None
    set_aside: str = ""
    variants: dict[str, str] = field(default_factory=dict)


def expand(text: str) -> list[str]:
    """Return every name a text stands for: words, each with its `{a,b}` written out."""
    return [name for word in text.split() for name in _expand(word)]


def _expand(word: str) -> Iterator[str]:
    if (found := re.search(r"\{([^{}]*)\}", word)) is None:
        yield word
        return
    for choice in found[1].split(","):
        yield from _expand(word.replace(found[0], choice))


_K = "Q2_K,Q3_K_L,Q3_K_M,Q3_K_S,Q4_K_M,Q4_K_S,Q5_K_M,Q5_K_S,Q6_K,Q8_0"
_UD = "UD-IQ1_M,UD-IQ1_S,UD-IQ2_M,UD-IQ2_XXS,UD-IQ3_XXS,UD-Q2_K_XL,UD-Q3_K_XL,UD-Q4_K_XL"
_UD_ALL = _UD + ",UD-Q5_K_XL,UD-Q6_K_XL,UD-Q8_K_XL"

REPOS = (
    Published(
        "unsloth/Qwen3-0.6B-GGUF",
        f"Qwen3-0.6B-{{BF16,IQ4_NL,IQ4_XS,Q2_K_L,Q4_0,Q4_1,{_K},{_UD_ALL}}}.gguf",
        "UD-Q4_K_XL",
        "Qwen3-0.6B-UD-Q4_K_XL.gguf",
        variants={"Q4_K_M": "Qwen3-0.6B-Q4_K_M.gguf", "q8_0": "Qwen3-0.6B-Q8_0.gguf"},
    ),
    Published(
        "unsloth/DeepSeek-R1-GGUF",
        "DeepSeek-R1-{Q4_K_M,Q8_0,UD-IQ1_S,UD-Q2_K_XL}/"
        "DeepSeek-R1-{Q4_K_M,Q8_0,UD-IQ1_S,UD-Q2_K_XL}-0000{1,2,3}-of-00003.gguf",
        "UD-Q2_K_XL",
        "DeepSeek-R1-UD-Q2_K_XL/DeepSeek-R1-UD-Q2_K_XL-0000{1,2,3}-of-00003.gguf",
        variants={"Q8_0": "DeepSeek-R1-Q8_0/DeepSeek-R1-Q8_0-00001-of-00003.gguf"},
    ),
    Published(
        "unsloth/gpt-oss-20b-GGUF",
        f"gpt-oss-20b-{{F16,Q2_K_L,Q4_0,Q4_1,{_K},UD-Q4_K_XL,UD-Q6_K_XL,UD-Q8_K_XL}}.gguf",
        "UD-Q4_K_XL",
        "gpt-oss-20b-UD-Q4_K_XL.gguf",
    ),
    Published(
        "ggml-org/gpt-oss-20b-GGUF",
        "gpt-oss-20b-mxfp4.gguf",
        "MXFP4",
        "gpt-oss-20b-mxfp4.gguf",
    ),
    Published(
        "ggml-org/gpt-oss-120b-GGUF",
        "gpt-oss-120b-mxfp4-0000{1,2,3}-of-00003.gguf",
        "MXFP4",
        "gpt-oss-120b-mxfp4-0000{1,2,3}-of-00003.gguf",
    ),
    Published(
        "bartowski/openai_gpt-oss-20b-GGUF",
        "openai_gpt-oss-20b-{bf16,MXFP4_MOE,Q8_0}.gguf openai_gpt-oss-20b-imatrix.gguf",
        "Q8_0",
        "openai_gpt-oss-20b-Q8_0.gguf",
        set_aside="openai_gpt-oss-20b-imatrix.gguf",
    ),
    Published(
        "noctrex/Qwen3-30B-A3B-MXFP4_MOE-GGUF",
        "Qwen3-30B-A3B-{BF16,MXFP4_MOE}.gguf",
        "BF16",
        "Qwen3-30B-A3B-BF16.gguf",
    ),
    Published(
        "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
        "Meta-Llama-3.1-8B-Instruct-{IQ2_M,IQ3_M,IQ3_XS,IQ4_XS,Q2_K_L,Q3_K_XL,Q4_0,Q4_0_4_4,"
        f"Q4_0_4_8,Q4_0_8_8,Q4_K_L,Q5_K_L,Q6_K_L,f32,{_K}}}.gguf "
        "Meta-Llama-3.1-8B-Instruct.imatrix",
        "Q4_K_M",
        "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        variants={"Q4_K_L": "Meta-Llama-3.1-8B-Instruct-Q4_K_L.gguf"},
    ),
    Published(
        "bartowski/Mistral-Large-Instruct-2411-GGUF",
        "Mistral-Large-Instruct-2411-{IQ1_M,IQ2_M,IQ2_XXS,Q2_K}.gguf "
        "Mistral-Large-Instruct-2411-{Q4_K_M,Q8_0}/"
        "Mistral-Large-Instruct-2411-{Q4_K_M,Q8_0}-0000{1,2}-of-00002.gguf",
        "Q4_K_M",
        "Mistral-Large-Instruct-2411-Q4_K_M/Mistral-Large-Instruct-2411-Q4_K_M-0000{1,2}-of-00002.gguf",
    ),
    Published(
        "TheBloke/Mistral-7B-Instruct-v0.2-GGUF",
        "mistral-7b-instruct-v0.2.{Q2_K,Q3_K_L,Q3_K_M,Q3_K_S,Q4_0,Q4_K_M,Q4_K_S,Q5_0,Q5_K_M,"
        "Q5_K_S,Q6_K,Q8_0}.gguf",
        "Q4_K_M",
        "mistral-7b-instruct-v0.2.Q4_K_M.gguf",
        variants={"Q4_0": "mistral-7b-instruct-v0.2.Q4_0.gguf"},
    ),
    Published(
        "TheBloke/phi-2-GGUF",
        "phi-2.{Q2_K,Q4_0,Q4_K_M,Q8_0}.gguf",
        "Q4_K_M",
        "phi-2.Q4_K_M.gguf",
    ),
    Published(
        "Qwen/Qwen3-8B-GGUF",
        "Qwen3-8B-{Q4_K_M,Q5_0,Q5_K_M,Q6_K,Q8_0}.gguf",
        "Q4_K_M",
        "Qwen3-8B-Q4_K_M.gguf",
    ),
    Published(
        "Qwen/Qwen2.5-7B-Instruct-GGUF",
        "qwen2.5-7b-instruct-{q2_k,q3_k_m}.gguf "
        "qwen2.5-7b-instruct-{fp16,q4_0,q4_k_m,q5_0,q8_0}-0000{1,2}-of-00002.gguf",
        "Q4_K_M",
        "qwen2.5-7b-instruct-q4_k_m-0000{1,2}-of-00002.gguf",
        variants={"fp16": "qwen2.5-7b-instruct-fp16-00001-of-00002.gguf"},
    ),
    Published(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "qwen2.5-coder-0.5b-instruct-{fp16,q2_k,q4_0,q8_0}.gguf",
        "Q8_0",
        "qwen2.5-coder-0.5b-instruct-q8_0.gguf",
    ),
    Published(
        "Qwen/Qwen3-Embedding-0.6B-GGUF",
        "Qwen3-Embedding-0.6B-{Q8_0,f16}.gguf",
        "Q8_0",
        "Qwen3-Embedding-0.6B-Q8_0.gguf",
    ),
    Published(
        "Qwen/Qwen3-VL-8B-Instruct-GGUF",
        "Qwen3VL-8B-Instruct-{F16,Q4_K_M,Q8_0}.gguf mmproj-Qwen3VL-8B-Instruct-{F16,Q8_0}.gguf",
        "Q4_K_M",
        "Qwen3VL-8B-Instruct-Q4_K_M.gguf",
        "mmproj-Qwen3VL-8B-Instruct-F16.gguf",
    ),
    Published(
        "unsloth/Qwen3-VL-30B-A3B-Instruct-GGUF",
        "Qwen3-VL-30B-A3B-Instruct-{Q4_K_M,UD-Q4_K_XL}.gguf mmproj-{BF16,F16,F32}.gguf "
        "BF16/Qwen3-VL-30B-A3B-Instruct-BF16-0000{1,2}-of-00002.gguf imatrix_unsloth.gguf",
        "UD-Q4_K_XL",
        "Qwen3-VL-30B-A3B-Instruct-UD-Q4_K_XL.gguf",
        "mmproj-F16.gguf",
        "imatrix_unsloth.gguf",
        {"BF16": "BF16/Qwen3-VL-30B-A3B-Instruct-BF16-00001-of-00002.gguf"},
    ),
    Published(
        "ggml-org/gemma-3-4b-it-GGUF",
        "gemma-3-4b-it-{Q4_K_M,Q8_0,f16}.gguf mmproj-model-f16.gguf",
        "Q4_K_M",
        "gemma-3-4b-it-Q4_K_M.gguf",
        "mmproj-model-f16.gguf",
    ),
    Published(
        "google/gemma-3-4b-it-qat-q4_0-gguf",
        "gemma-3-4b-it-q4_0.gguf mmproj-model-f16-4B.gguf",
        "Q4_0",
        "gemma-3-4b-it-q4_0.gguf",
        "mmproj-model-f16-4B.gguf",
    ),
    Published(
        "bartowski/google_gemma-3-27b-it-qat-GGUF",
        "google_gemma-3-27b-it-qat-{IQ2_S,IQ2_XS,Q4_0,Q4_1,Q8_0,bf16}.gguf "
        "google_gemma-3-27b-it-qat-imatrix.gguf mmproj-google_gemma-3-27b-it-qat-{bf16,f16}.gguf",
        "Q8_0",
        "google_gemma-3-27b-it-qat-Q8_0.gguf",
        "mmproj-google_gemma-3-27b-it-qat-f16.gguf",
        "google_gemma-3-27b-it-qat-imatrix.gguf",
    ),
    Published(
        "ggml-org/SmolVLM2-2.2B-Instruct-GGUF",
        "SmolVLM2-2.2B-Instruct-{Q4_K_M,Q8_0,f16}.gguf "
        "mmproj-SmolVLM2-2.2B-Instruct-{Q8_0,f16}.gguf",
        "Q4_K_M",
        "SmolVLM2-2.2B-Instruct-Q4_K_M.gguf",
        "mmproj-SmolVLM2-2.2B-Instruct-f16.gguf",
    ),
    Published(
        "ggml-org/Qwen2.5-Omni-3B-GGUF",
        "Qwen2.5-Omni-3B-{Q4_K_M,Q8_0,f16}.gguf mmproj-Qwen2.5-Omni-3B-{Q8_0,f16}.gguf",
        "Q4_K_M",
        "Qwen2.5-Omni-3B-Q4_K_M.gguf",
        "mmproj-Qwen2.5-Omni-3B-f16.gguf",
    ),
    Published(
        "ggml-org/ultravox-v0_5-llama-3_2-1b-GGUF",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf mmproj-ultravox-v0_5-llama-3_2-1b-f16.gguf",
        "Q4_K_M",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        "mmproj-ultravox-v0_5-llama-3_2-1b-f16.gguf",
    ),
    Published(
        "openbmb/MiniCPM-V-2_6-gguf",
        "ggml-model-{Q2_K,Q4_0,Q4_K_M,Q8_0,f16}.gguf mmproj-model-f16.gguf",
        "Q4_K_M",
        "ggml-model-Q4_K_M.gguf",
        "mmproj-model-f16.gguf",
    ),
    Published(
        "xtuner/llava-llama-3-8b-v1_1-gguf",
        "llava-llama-3-8b-v1_1-{f16,int4}.gguf llava-llama-3-8b-v1_1-mmproj-f16.gguf",
        "F16",
        "llava-llama-3-8b-v1_1-f16.gguf",
        "llava-llama-3-8b-v1_1-mmproj-f16.gguf",
    ),
    Published(
        "mys/ggml_llava-v1.5-7b",
        "ggml-model-{f16,q4_k,q5_k}.gguf mmproj-model-f16.gguf",
        "F16",
        "ggml-model-f16.gguf",
        "mmproj-model-f16.gguf",
    ),
    Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF",
        "smollm2-135m-instruct-{q4_k_m,q8_0}.gguf smollm2-135m-instruct-add-bos-q8_0.gguf",
        "Q4_K_M",
        "smollm2-135m-instruct-q4_k_m.gguf",
    ),
    Published(
        "bartowski/SmolLM2-135M-Instruct-GGUF",
        f"SmolLM2-135M-Instruct-{{IQ3_M,IQ4_XS,Q4_0,f16,{_K}}}.gguf",
        "Q4_K_M",
        "SmolLM2-135M-Instruct-Q4_K_M.gguf",
    ),
    Published(
        "microsoft/Phi-3-mini-4k-instruct-gguf",
        "Phi-3-mini-4k-instruct-{fp16,q4}.gguf",
        "Q4",
        "Phi-3-mini-4k-instruct-q4.gguf",
        variants={"fp16": "Phi-3-mini-4k-instruct-fp16.gguf"},
    ),
    Published(
        "microsoft/bitnet-b1.58-2B-4T-gguf",
        "ggml-model-i2_s.gguf",
        "ggml-model-i2_s.gguf",
        "ggml-model-i2_s.gguf",
    ),
    Published(
        "microsoft/phi-4-gguf",
        "phi-4-{IQ1_M,IQ1_S,IQ2_S,IQ2_XS,Q4_0,Q4_K,Q4_K_S,Q5_K,Q8_0,bf16}.gguf",
        "Q4_K_S",
        "phi-4-Q4_K_S.gguf",
        variants={"Q4_K": "phi-4-Q4_K.gguf"},
    ),
    Published(
        "mradermacher/Llama-3.3-70B-Instruct-i1-GGUF",
        "Llama-3.3-70B-Instruct.i1-{IQ1_M,IQ1_S,IQ2_M,IQ2_S,IQ2_XS,IQ2_XXS,IQ3_M,IQ3_S,IQ3_XS,"
        "IQ3_XXS,IQ4_XS,Q2_K,Q2_K_S,Q4_0,Q4_1,Q4_K_M,Q4_K_S,Q5_K_M}.gguf "
        "Llama-3.3-70B-Instruct.i1-Q6_K.gguf.part{1of2,2of2} imatrix.dat "
        "Llama-3.3-70B-Instruct.imatrix.gguf",
        "Q4_K_M",
        "Llama-3.3-70B-Instruct.i1-Q4_K_M.gguf",
        set_aside="Llama-3.3-70B-Instruct.imatrix.gguf",
    ),
    Published(
        "mradermacher/SmolLM2-imatrix-tuned-GGUF",
        "SmolLM2-imatrix-tuned.{Q4_K_M,Q8_0}.gguf SmolLM2-imatrix-tuned.imatrix.gguf",
        "Q4_K_M",
        "SmolLM2-imatrix-tuned.Q4_K_M.gguf",
        set_aside="SmolLM2-imatrix-tuned.imatrix.gguf",
    ),
    Published(
        "duyntnet/Hermes-3-Llama-3.1-8B-imatrix-GGUF",
        "Hermes-3-Llama-3.1-8B-{IQ4_XS,Q4_K_M,Q6_K}-imatrix.gguf imatrix.gguf",
        "Q4_K_M",
        "Hermes-3-Llama-3.1-8B-Q4_K_M-imatrix.gguf",
        set_aside="imatrix.gguf",
    ),
    Published(
        "lmstudio-community/DeepSeek-R1-0528-Qwen3-8B-GGUF",
        "DeepSeek-R1-0528-Qwen3-8B-{Q3_K_L,Q4_K_M,Q6_K,Q8_0}.gguf",
        "Q4_K_M",
        "DeepSeek-R1-0528-Qwen3-8B-Q4_K_M.gguf",
    ),
    Published(
        "lmstudio-community/gemma-3n-E4B-it-text-GGUF",
        "gemma-3n-E4B-it-{Q4_K_M,Q8_0}.gguf",
        "Q4_K_M",
        "gemma-3n-E4B-it-Q4_K_M.gguf",
    ),
    Published(
        "ggml-org/Qwen3-Coder-30B-A3B-Instruct-Q8_0-GGUF",
        "qwen3-coder-30b-a3b-instruct-q8_0.gguf",
        "Q8_0",
        "qwen3-coder-30b-a3b-instruct-q8_0.gguf",
    ),
    Published(
        "ggml-org/embeddinggemma-300M-GGUF",
        "embeddinggemma-300M-Q8_0.gguf",
        "Q8_0",
        "embeddinggemma-300M-Q8_0.gguf",
    ),
    Published(
        "gpustack/bge-reranker-v2-m3-GGUF",
        "bge-reranker-v2-m3-{FP16,Q2_K,Q3_K,Q4_0,Q4_K_M,Q5_0,Q5_K_M,Q6_K,Q8_0}.gguf",
        "Q4_K_M",
        "bge-reranker-v2-m3-Q4_K_M.gguf",
    ),
    Published(
        "nomic-ai/nomic-embed-text-v1.5-GGUF",
        f"nomic-embed-text-v1.5.{{f16,f32,Q4_0,Q5_0,{_K}}}.gguf",
        "Q4_K_M",
        "nomic-embed-text-v1.5.Q4_K_M.gguf",
    ),
    Published(
        "unsloth/GLM-4.6-GGUF",
        "{BF16,Q4_K_M,UD-Q2_K_XL,UD-Q4_K_XL}/"
        "GLM-4.6-{BF16,Q4_K_M,UD-Q2_K_XL,UD-Q4_K_XL}-0000{1,2}-of-00002.gguf "
        "GLM-4.6-UD-TQ1_0.gguf",
        "UD-Q4_K_XL",
        "UD-Q4_K_XL/GLM-4.6-UD-Q4_K_XL-0000{1,2}-of-00002.gguf",
        variants={"UD-TQ1_0": "GLM-4.6-UD-TQ1_0.gguf"},
    ),
    Published(
        "unsloth/Qwen3.5-4B-MTP-GGUF",
        "Qwen3.5-4B-{Q4_K_M,UD-Q4_K_XL}.gguf mtp-Qwen3.5-4B-Q8_0.gguf mmproj-F16.gguf",
        "UD-Q4_K_XL",
        "Qwen3.5-4B-UD-Q4_K_XL.gguf",
        "mmproj-F16.gguf",
        "mtp-Qwen3.5-4B-Q8_0.gguf",
    ),
    Published(
        "AngelSlim/Qwen3-8B_eagle3-GGUF",
        "Qwen3-8B-Q4_K_M.gguf Qwen3-8B_eagle3-{F16,Q4_K_M}.gguf",
        "Q4_K_M",
        "Qwen3-8B-Q4_K_M.gguf",
        set_aside="Qwen3-8B_eagle3-{F16,Q4_K_M}.gguf",
    ),
    Published(
        "someone/Llama-3.1-8B-Instruct-EAGLE3-GGUF",
        "Llama-3.1-8B-Instruct-{Q4_K_M,Q8_0}.gguf EAGLE3-Llama-3.1-8B-Instruct-F16.gguf",
        "Q4_K_M",
        "Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        set_aside="EAGLE3-Llama-3.1-8B-Instruct-F16.gguf",
    ),
    Published(
        "unsloth/DeepSeek-V3-0324-GGUF",
        "{Q4_K_M,UD-IQ1_S}/DeepSeek-V3-0324-{Q4_K_M,UD-IQ1_S}-0000{1,2}-of-00002.gguf",
        "UD-IQ1_S",
        "UD-IQ1_S/DeepSeek-V3-0324-UD-IQ1_S-0000{1,2}-of-00002.gguf",
        variants={"Q4_K_M": "Q4_K_M/DeepSeek-V3-0324-Q4_K_M-00001-of-00002.gguf"},
    ),
    Published(
        "someone/Qwen3-14B-with-draft-GGUF",
        "Qwen3-14B-Q5_K_M.gguf draft-Qwen3-0.6B-Q4_K_M.gguf Qwen3-0.6B-draft-Q8_0.gguf",
        "Q5_K_M",
        "Qwen3-14B-Q5_K_M.gguf",
        set_aside="draft-Qwen3-0.6B-Q4_K_M.gguf Qwen3-0.6B-draft-Q8_0.gguf",
    ),
    Published(
        "ggml-org/LoRA-Qwen2.5-1.5B-Instruct-abliterated-F16-GGUF",
        "LoRA-Qwen2.5-1.5B-Instruct-abliterated-f16.gguf Qwen2.5-1.5B-Instruct-Q4_K_M.gguf",
        "Q4_K_M",
        "Qwen2.5-1.5B-Instruct-Q4_K_M.gguf",
        set_aside="LoRA-Qwen2.5-1.5B-Instruct-abliterated-f16.gguf",
    ),
    Published(
        "someone/story-writer-GGUF",
        "story-writer-Q4_K_M.gguf story-writer-lora-f16.gguf adapters/story-adapter-F16.gguf "
        "control-vectors/story-writer-8B__control_vector.gguf",
        "Q4_K_M",
        "story-writer-Q4_K_M.gguf",
        set_aside="story-writer-lora-f16.gguf adapters/story-adapter-F16.gguf "
        "control-vectors/story-writer-8B__control_vector.gguf",
    ),
    Published(
        "ibm-granite/granite-4.0-h-tiny-GGUF",
        f"granite-4.0-h-tiny-{{bf16,f16,Q4_0,Q4_1,Q5_0,Q5_1,{_K}}}.gguf",
        "Q4_K_M",
        "granite-4.0-h-tiny-Q4_K_M.gguf",
        variants={"Q5_1": "granite-4.0-h-tiny-Q5_1.gguf"},
    ),
    Published(
        "second-state/Yi-34B-Chat-GGUF",
        "Yi-34B-Chat-{Q4_0,Q5_1}.GGUF Yi-34B-Chat-{ggml-model-q4_0,ggml-model-q8_0}.gguf",
        "Q8_0",
        "Yi-34B-Chat-ggml-model-q8_0.gguf",
    ),
    Published(
        "city96/t5-v1_1-xxl-encoder-gguf",
        "T5-V1_1-XXL-ENCODER-{F16,Q4_K_M,Q5_K_S}.GGUF",
        "Q4_K_M",
        "T5-V1_1-XXL-ENCODER-Q4_K_M.GGUF",
    ),
    Published(
        "nvidia/Nemotron-3-Nano-NVFP4-GGUF",
        "Nemotron-3-Nano-{BF16,NVFP4}.gguf",
        "BF16",
        "Nemotron-3-Nano-BF16.gguf",
    ),
)
