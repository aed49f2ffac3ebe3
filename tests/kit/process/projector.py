"""Vision projectors for the tiny model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy


def write_projector(path: Path, *, width: int = 64, kind: str = "mlp", whole: bool = True) -> Path:
    """Write a vision projector of zeros.

    Args:
        width: Embedding length of the text model; 64 fits the tiny model.
        kind: Its type; llama.cpp knows `mlp`.
        whole: Without this some of its tensors are missing.
    """
    writer = gguf.GGUFWriter(path, "clip")
    for name in ("has_vision_encoder", "has_llava_projector", "use_gelu"):
        writer.add_bool(f"clip.{name}", True)
    writer.add_string("clip.projector_type", kind)
    sizes = {"image_size": 28, "patch_size": 14, "embedding_length": 32, "block_count": 1}
    sizes |= {"feed_forward_length": 64, "projection_dim": width, "attention.head_count": 2}
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (32, 3, 14, 14),
        "v.class_embd": (32,),
        "v.position_embd.weight": (5, 32),
    }
    layers = {f"v.blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
    layers |= {"v.blk.0.ffn_up": (64, 32), "v.blk.0.ffn_down": (32, 64)}
    layers |= {"mm.0": (width, 32), "mm.2": (width, width)}
    for name, square in layers.items():
        shapes |= {f"{name}.weight": square, f"{name}.bias": square[:1]}
    for name in ("v.pre_ln", "v.post_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    for name, shape in shapes.items():
        if whole or not name.startswith("v.blk"):
            writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    """Write a file to the end, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
