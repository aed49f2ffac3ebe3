"""Check the header of a GGUF file, before a running model is stopped for it.

Finds what llama.cpp would find only later: a wrong magic or version, a malformed header, tensors
that do not lie inside of the file, and files that are no model.

Source: the GGUF specification in ggml's docs; block sizes from ggml's type traits; roles from
gguf-py's `GGUFType` and the architectures that llama.cpp lists.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader, FileIO
from typing import Final

from orchestrator.errors import InvalidModel
from orchestrator.settings.files import FileIdentity

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_UINT32: Final = 4
_STRING: Final = 8
_ARRAY: Final = 9
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_ITEMS: Final = 1 << 24
_MAX_ENTRIES: Final = 1 << 16  # of pairs, and of tensors: read one by one, 5 µs each
_MAX_TEXTS: Final = 1 << 22  # in all vocabularies of a file: 0.7 µs each
_MAX_DIMENSIONS: Final = 8
_MAX_TEXT: Final = 65536
_ALIGNMENT: Final = 32
_CHUNK: Final = 1 << 20
_ROLE_BYTES: Final = 1 << 14
_GENERAL: Final = (b"general.alignment", b"general.architecture", b"general.type")
_WANTED: Final = frozenset((*_GENERAL, b"adapter.type", b"split.count"))  # of thousands, perhaps
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


@lru_cache(maxsize=1024)  # more than a split model has parts, or every part would be evicted
def inspect(file: FileIdentity, field: str = "model_path") -> str | None:
    """Return the architecture in the header; once per file identity, in about 0.1 s.

    Raises:
        InvalidModel: empty, truncated, or not a GGUF (field as given).
    """
    if file.size_bytes == 0:
        raise _invalid(file, "is empty: download it again", field)
    try:
        with BufferedReader(FileIO(file.path), _CHUNK) as opened:
            if opened.read(4) != _MAGIC:
                raise _invalid(file, "is not a GGUF file: give a .gguf file", field)
            return _Reader(opened, file.size_bytes).architecture()
    except OSError as error:
        raise _invalid(file, f"cannot be read ({error.strerror})", field) from error
    except struct.error as error:
        raise _invalid(file, "is truncated inside its header: download it again", field) from error
    except _Malformed as error:
        raise _invalid(file, f"is damaged: {error}; download it again", field) from error


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

    def _pairs(self) -> Iterator[tuple[bytes, object]]:
        for _ in range(self._count_of_pairs):
            yield self._text(), self._value(self._number("<I"))

    def role(self) -> str | None:
        metadata: dict[bytes, object] = {}
        for key, value in self._pairs():
            metadata |= {key: value} if key in _WANTED else {}
            if key.startswith(b"tokenizer.") and self._tensors:
                break  # what matters comes before a vocabulary, which is long
        is_adapter = b"adapter" if b"adapter.type" in metadata else None
        kinds = metadata.get(b"general.architecture"), is_adapter, metadata.get(b"general.type")
        found = next((_ROLES[kind] for kind in kinds if kind in _ROLES), None)
        if self._tensors or found not in {None, "model"} or b"split.count" in metadata:
            return found  # the first part of a split model may have no tensors
        return "vocabulary"

    def architecture(self) -> str | None:
        metadata = {key: value for key, value in self._pairs() if key in _WANTED}
        ends = [self._tensor_end() for _ in range(self._tensors)]
        alignment = metadata.get(b"general.alignment")
        name = metadata.get(b"general.architecture")
        step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
        data_starts = -(-self._file.tell() // step) * step
        missing = data_starts + max(ends, default=0) - self._size
        if self._tensors and missing > 0:
            raise _Malformed(f"{missing} bytes are missing at its end")
        return name.decode("utf-8", "replace") if isinstance(name, bytes) else None

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

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._text()
        if kind == _UINT32:
            return self._number("<I")
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind != _ARRAY:
            raise _Malformed(f"metadata of unknown type {kind}")
        elif (item := self._number("<I")) == _STRING:
            count = self._count("<Q", self._texts_left)
            self._texts_left -= count
            self._skip_texts(count)
        elif item in _SIZES:
            self._skip(_SIZES[item] * self._count("<Q"))
        else:
            raise _Malformed(f"an array of unknown type {item}")
        return None

    def _tensor_end(self) -> int:
        """Return where a tensor's bytes end, from the start of the data section."""
        self._text()
        values = 1
        for _ in range(self._count("<I", _MAX_DIMENSIONS)):
            values *= self._number("<Q")
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in BLOCKS:
            return offset  # newer than this table: leave it to the server
        block, size = BLOCKS[kind]
        return offset + values // block * size
