"""Read the header of a GGUF file, and check it before a running model is stopped for it.

Finds what llama.cpp would find only later: a wrong magic or version, a malformed header, tensors
that do not lie inside of the file, and files that are no model.

Source: the GGUF specification in ggml's docs; block sizes from ggml's type traits; roles from
gguf-py's `GGUFType` and the architectures that llama.cpp lists.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader, FileIO
from typing import Final, NamedTuple

from orchestrator.errors import InvalidModel
from orchestrator.settings.files import FileIdentity

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_INTEGERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 7: "B", 10: "Q", 11: "q"}
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_ITEMS: Final = 1 << 24
_MAX_ENTRIES: Final = 1 << 16  # of pairs, and of tensors: read one by one, 5 µs each
_MAX_TEXTS: Final = 1 << 22  # in all vocabularies of a file: 0.7 µs each
_MAX_DIMENSIONS: Final = 8
_MAX_INTEGERS: Final = 1 << 14  # in all arrays that are kept: one for each layer
_MAX_TEXT: Final = 65536
_MAX_KEY: Final = 256  # of one that is kept
_ALIGNMENT: Final = 32
_CHUNK: Final = 1 << 20
_ROLE_BYTES: Final = 1 << 14
_ARCHITECTURE: Final = b"general.architecture"
_GENERAL: Final = (b"general.alignment", _ARCHITECTURE, b"general.type")
_WANTED: Final = frozenset((*_GENERAL, b"adapter.type", b"split.count"))  # of thousands, perhaps
_NUMBERS: Final = frozenset(
    b"""context_length block_count embedding_length feed_forward_length expert_feed_forward_length
    expert_used_count full_attention_interval attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.key_length_mla attention.causal
    attention.sliding_window attention.sliding_window_pattern ssm.conv_kernel ssm.inner_size
    ssm.state_size ssm.group_count wkv.head_size""".split()
)
_VOCABULARY: Final = b"tokenizer.ggml.tokens"
_INPUT: Final = b"token_embd.weight"
_OUTPUT: Final = b"output.weight"
_ROLES: Final = {  # by general.architecture, or general.type
    b"clip": "projector",
    b"mmproj": "projector",
    b"adapter": "adapter",
    b"controlvector": "control vector",
    b"imatrix": "imatrix",
    **dict.fromkeys((b"eagle", b"eagle2", b"eagle3", b"dflash", b"dspark"), "head"),
    b"gemma4-assistant": "head",
    b"model": "model",
}

_BYTES_PER_BLOCK: Final = {  # values in a block -> tensor type -> bytes of a block
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 36, 20: 18, 39: 17},
    64: {40: 36},
    128: {41: 18},
    256: {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 15: 292, 34: 54, 35: 66}
    | {16: 66, 17: 74, 18: 98, 19: 50, 21: 110, 22: 82, 23: 136, 29: 56},
}
BLOCKS: Final = {kind: (n, size) for n, by in _BYTES_PER_BLOCK.items() for kind, size in by.items()}


class _Malformed(Exception):
    """Says what is wrong with the header."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        architecture: None if it has none.
        size_bytes: Where the tensors begin.
        numbers: Integers, and short arrays of them, by their keys without the architecture.
        vocab_size: How many tokens it lists.
        input_kind: The type of the token embedding; None if the file has none.
        input_bytes: The size of the token embedding.
        has_output: Whether it, or another part of the model, may have an output matrix.
    """

    architecture: str | None
    size_bytes: int
    numbers: Mapping[str, int | tuple[int, ...]]
    vocab_size: int
    input_kind: int | None
    input_bytes: int
    has_output: bool


@lru_cache(maxsize=1024)  # more than a split model has parts, or every part would be evicted
def header(file: FileIdentity, field: str = "model_path") -> Header:
    """Return the header; read once per file identity, in about 0.1 s.

    Raises:
        InvalidModel: empty, truncated, or not a GGUF (field as given).
    """
    if file.size_bytes == 0:
        raise _invalid(file, "is empty: download it again", field)
    try:
        with BufferedReader(FileIO(file.path), _CHUNK) as opened:
            if opened.read(4) != _MAGIC:
                raise _invalid(file, "is not a GGUF file: give a .gguf file", field)
            return _Reader(opened, file.size_bytes).header()
    except OSError as error:
        raise _invalid(file, f"cannot be read ({error.strerror})", field) from error
    except struct.error as error:
        raise _invalid(file, "is truncated inside its header: download it again", field) from error
    except _Malformed as error:
        raise _invalid(file, f"is damaged: {error}; download it again", field) from error


def inspect(file: FileIdentity, field: str = "model_path") -> str | None:
    """Return the architecture in the header.

    Raises:
        InvalidModel: as `header`.
    """
    return header(file, field).architecture


@lru_cache(maxsize=1024)
def role(file: FileIdentity) -> str | None:
    """Return what a file is by the start of its header: one of `_ROLES`, or `vocabulary`. None if
    it does not say, or cannot be read.
    """
    with (
        contextlib.suppress(OSError, struct.error, _Malformed),
        BufferedReader(FileIO(file.path), _ROLE_BYTES) as opened,
    ):
        return _Reader(opened, file.size_bytes).role() if opened.read(4) == _MAGIC else None
    return None


def _numbers(
    metadata: Mapping[bytes, object], architecture: bytes
) -> dict[str, int | tuple[int, ...]]:
    prefix, found = architecture + b".", dict[str, int | tuple[int, ...]]()
    for key, value in metadata.items():
        if isinstance(value, int | tuple) and key.startswith(prefix):
            found[key.removeprefix(prefix).decode()] = value
    return found


def _invalid(file: FileIdentity, what: str, field: str) -> InvalidModel:
    return InvalidModel.because(f"{file.path} {what}", field=field)


class _Reader:
    """A cursor over the header. No mapping: a mapped file that shrinks kills the whole process."""

    def __init__(self, file: BufferedReader[FileIO], size_bytes: int) -> None:
        self._file = file
        self._size = size_bytes
        version = self._number("<I")
        if version not in _VERSIONS:
            raise _Malformed(f"version {version} is not {' or '.join(map(str, _VERSIONS))}")
        self._tensors = self._count("<Q", _MAX_ENTRIES)
        self._count_of_pairs = self._count("<Q", _MAX_ENTRIES)
        self._texts_left = _MAX_TEXTS
        self._integers_left = _MAX_INTEGERS

    def _pairs(self, wanted: Collection[bytes]) -> Iterator[tuple[bytes, object]]:
        """Yield every key, and the value of those that are wanted, which may come with the name of
        the architecture in front. Of a vocabulary the value is its length.
        """
        for _ in range(self._count_of_pairs):
            key = self._text()
            is_wanted = key in wanted or key.partition(b".")[2] in wanted
            value = self._value(self._number("<I"), is_wanted)
            yield key, value if is_wanted else None

    def role(self) -> str | None:
        metadata: dict[bytes, object] = {}
        for key, value in self._pairs(_WANTED):
            metadata |= {key: value} if key in _WANTED else {}
            if key.startswith(b"tokenizer.") and self._tensors:
                break  # what matters comes before a vocabulary, which is long
        is_adapter = b"adapter" if b"adapter.type" in metadata else None
        kinds = metadata.get(_ARCHITECTURE), is_adapter, metadata.get(b"general.type")
        found = next((_ROLES[kind] for kind in kinds if kind in _ROLES), None)
        if self._tensors or found not in {None, "model"} or b"split.count" in metadata:
            return found  # the first part of a split model may have no tensors
        return "vocabulary"

    def header(self) -> Header:
        metadata = {
            key: value
            for key, value in self._pairs(_WANTED | _NUMBERS | {_VOCABULARY})
            if key in _WANTED or (isinstance(value, int | tuple) and len(key) <= _MAX_KEY)
        }
        end, embedding, has_output = 0, None, b"split.count" in metadata
        for tensor in (self._tensor() for _ in range(self._tensors)):
            end = max(end, tensor.end)
            embedding = tensor if tensor.name == _INPUT else embedding
            has_output = has_output or tensor.name == _OUTPUT
        alignment, count = metadata.get(b"general.alignment"), metadata.get(_VOCABULARY)
        step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
        data_starts = -(-self._file.tell() // step) * step
        missing = data_starts + end - self._size
        if self._tensors and missing > 0:
            raise _Malformed(f"{missing} bytes are missing at its end")
        name = metadata.get(_ARCHITECTURE)
        name = name if isinstance(name, bytes) else None
        return Header(
            architecture=None if name is None else name.decode("utf-8", "replace"),
            size_bytes=data_starts,
            numbers=_numbers(metadata, name or b""),
            vocab_size=count if isinstance(count, int) else 0,
            input_kind=embedding and embedding.kind,
            input_bytes=embedding.size_bytes if embedding else 0,
            has_output=has_output,
        )

    def _take(self, length: int) -> bytes:
        if len(data := self._file.read(length)) < length:
            raise struct.error("past the end")
        return data

    def _skip(self, length: int) -> None:
        if self._file.seek(min(length, self._size), os.SEEK_CUR) > self._size:
            raise struct.error("past the end")

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _count(self, form: str, most: int = _MAX_ITEMS) -> int:
        if (count := self._number(form)) > most:
            raise _Malformed(f"a count of {count} is too large")
        return count

    def _text(self) -> bytes:
        if (length := self._number("<Q")) <= _MAX_TEXT:
            return self._take(length)
        self._skip(length)
        return b""

    def _skip_texts(self, count: int) -> None:
        """Skip a vocabulary, of hundreds of thousands of short texts."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            data, at = self._file.peek(), 0
            end = len(data)
            while count and at + 8 <= end and (stop := at + 8 + length_at(data, at)[0]) <= end:
                at, count = stop, count - 1
            self._skip(at)
            if count:  # one that extends beyond the data
                self._text()
                count -= 1

    def _value(self, kind: int, is_wanted: bool) -> object:
        if kind == _STRING:
            return self._text()
        if kind in _INTEGERS and is_wanted:
            return self._integers(kind, 1)[0]
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind != _ARRAY:
            raise _Malformed(f"metadata of unknown type {kind}")
        elif (item := self._number("<I")) == _STRING:
            count = self._count("<Q", self._texts_left)
            self._texts_left -= count
            self._skip_texts(count)
            return count
        elif item not in _SIZES:
            raise _Malformed(f"an array of unknown type {item}")
        else:
            count = self._count("<Q")
            if is_wanted and item in _INTEGERS and count <= self._integers_left:
                self._integers_left -= count
                return self._integers(item, count)
            self._skip(_SIZES[item] * count)
        return None

    def _integers(self, kind: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}{_INTEGERS[kind]}", self._take(_SIZES[kind] * count))

    def _tensor(self) -> _Tensor:
        """Return a tensor, with where its bytes end, from the start of the data section."""
        name, values = self._text(), 1
        for _ in range(self._count("<I", _MAX_DIMENSIONS)):
            values *= self._number("<Q")
        kind, offset = self._number("<I"), self._number("<Q")
        block, size = BLOCKS.get(kind, (1, 0))  # newer than this table: leave it to the server
        size_bytes = values // block * size
        return _Tensor(name, kind, size_bytes, offset + size_bytes)


class _Tensor(NamedTuple):
    name: bytes
    kind: int
    size_bytes: int
    end: int
