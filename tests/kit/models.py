"""GGUF files as they are published."""

from __future__ import annotations

from pathlib import Path

import gguf

MODEL = "unsloth/Qwen3-0.6B-GGUF"
TINY = "org/Tiny-GGUF"


def split_gguf(whole: Path, prefix: Path) -> list[Path]:
    """Write a model in two shards, with the names that llama.cpp expects; return their paths."""
    reader = gguf.GGUFReader(whole)
    path = f"{prefix}.gguf"  # the writer adds the numbers before the suffix
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=len(reader.tensors) // 2 + 1)
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != gguf.Keys.General.ARCHITECTURE:
            is_array = value.types[0] == gguf.GGUFValueType.ARRAY
            inner = value.types[-1] if is_array else None
            writer.add_key_value(name, value.contents(), value.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(prefix.parent.glob(f"{prefix.name}-0000*-of-*.gguf"))
