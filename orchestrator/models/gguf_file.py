"""Is this file a whole GGUF? Read from its header alone, before a running model is given up for it.

Checks what llama.cpp would find out only after the old server is gone: magic, version, a header
that makes sense, and that every tensor lies inside the file.

Source: the GGUF specification in ggml's docs; block sizes from ggml's type traits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Final

from orchestrator.errors import InvalidModel
from orchestrator.settings.files import FileIdentity

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_ITEMS: Final = 1 << 24
_MAX_TEXT: Final = 65536
_ALIGNMENT: Final = 32
_CHUNK: Final = 1 << 20
_WANTED: Final = (b"general.alignment", b"general.architecture")

# tensor type -> (values in a block, bytes of a block)
BLOCKS: Final[dict[int, tuple[int, int]]] = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 36),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What a header says: the architecture, and how many tensors lie in this file."""

    architecture: str | None
    tensors: int


class _Broken(Exception):
    """The header does not make sense; the text says where."""


@lru_cache(maxsize=1024)  # more than a split model has parts, or none of them would be found again
def inspect(file: FileIdentity, field: str = "model_path") -> GgufInfo:
    """Return what the header says, once per file identity. About 0.1 s for a large vocabulary.

    Args:
        file: The file, as looked at; a replaced file is inspected again.
        field: The request field to blame.

    Raises:
        InvalidModel: empty, truncated, or not a GGUF.
    """
    if file.size_bytes == 0:
        raise _invalid(file, "is empty: download it again", field)
    try:
        with open(file.path, "rb") as opened:
            if opened.read(4) != _MAGIC:
                raise _invalid(file, "is not a GGUF file: give a .gguf file", field)
            return _Reader(opened, file.size_bytes).info()
    except OSError as error:
        raise _invalid(file, f"cannot be read ({error.strerror})", field) from error
    except struct.error as error:
        raise _invalid(file, "is truncated inside its header: download it again", field) from error
    except _Broken as error:
        raise _invalid(file, f"is damaged: {error}; download it again", field) from error


def _invalid(file: FileIdentity, what: str, field: str) -> InvalidModel:
    return InvalidModel.because(f"{file.path} {what}", field=field)


class _Reader:
    """A cursor over the header. Not a mapping: a mapped file that shrinks ends the whole host."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._size = size_bytes
        self._data = b""
        self._at = 0  # in the data
        self._starts = 4  # of the data, in the file

    @property
    def _position(self) -> int:
        return self._starts + self._at

    def info(self) -> GgufInfo:
        version = self._number("<I")
        if version not in _VERSIONS:
            raise _Broken(f"version {version} is not {' or '.join(map(str, _VERSIONS))}")
        tensors, pairs = self._count("<Q"), self._count("<Q")
        metadata: dict[bytes, object] = {}
        for _ in range(pairs):
            key, value = self._text(), self._value(self._number("<I"))
            if key in _WANTED:
                metadata[key] = value
        ends = [self._tensor_end() for _ in range(tensors)]
        alignment = metadata.get(_WANTED[0])
        step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
        data_starts = -(-self._position // step) * step
        missing = data_starts + max(ends, default=0) - self._size
        if tensors and missing > 0:
            raise _Broken(f"truncated, {missing} of its bytes are missing")
        name = metadata.get(_WANTED[1])
        return GgufInfo(
            name.decode("utf-8", "replace") if isinstance(name, bytes) else None, tensors
        )

    def _take(self, length: int) -> int:
        """Pass over so many bytes; return where in the data they start."""
        if self._position + length > self._size:
            raise struct.error("past the end")
        if self._at + length > len(self._data):
            self._starts += self._at
            rest = self._data[self._at :]
            self._data = rest + self._file.read(max(_CHUNK, length - len(rest)))
            self._at = 0
            if len(self._data) < length:
                raise struct.error("it has shrunk")
        start, self._at = self._at, self._at + length
        return start

    def _number(self, form: str) -> int:
        start = self._take(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, start)[0])

    def _count(self, form: str) -> int:
        if (count := self._number(form)) > _MAX_ITEMS:
            raise _Broken(f"a count of {count} makes no sense")
        return count

    def _skip(self, length: int) -> None:
        while length > 0:
            step = min(length, _CHUNK)
            self._take(step)
            length -= step

    def _text(self) -> bytes:
        length = self._number("<Q")
        if length > _MAX_TEXT:
            self._skip(min(length, self._size))
            return b""
        start = self._take(length)
        return self._data[start : self._at]

    def _skip_texts(self, count: int) -> None:
        """A vocabulary: hundreds of thousands of short texts."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            data, at, end = self._data, self._at, len(self._data)
            while count and at + 8 <= end and (stop := at + 8 + length_at(data, at)[0]) <= end:
                at, count = stop, count - 1
            self._at = at
            if count:  # the one that crosses the end of what has been read
                self._text()
                count -= 1

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._number("<I"), self._count("<Q")
            if item == _STRING:
                self._skip_texts(count)
            elif item in _SIZES:
                self._skip(_SIZES[item] * count)
            else:
                raise _Broken(f"an array of unknown type {item}")
            return None
        if kind not in _SIZES:
            raise _Broken(f"metadata of unknown type {kind}")
        if kind == 4:
            return self._number("<I")
        self._skip(_SIZES[kind])
        return None

    def _tensor_end(self) -> int:
        """Return where this tensor's bytes end, counted from the start of the data."""
        self._text()
        values = 1
        for _ in range(self._dimensions()):
            values *= self._number("<Q")
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in BLOCKS:
            return offset  # newer than this table: the server will know
        block, size = BLOCKS[kind]
        return offset + values // block * size

    def _dimensions(self) -> int:
        if (count := self._number("<I")) > 8:
            raise _Broken(f"a tensor of {count} dimensions makes no sense")
        return count
