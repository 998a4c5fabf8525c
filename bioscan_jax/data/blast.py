"""Reads nucleotide databases of BLAST, version 4: an index (.nin), names (.nhr) and sequences (.nsq).

The format is that of NCBI's C toolkit (readdb.h): numbers are big-endian, four bases are packed into a byte, and
ambiguous bases are listed after them.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt32

_VERSION, _NUCLEOTIDE = 4, 0
_BASES = np.frombuffer(b"ACGT", np.uint8)
_AMBIGUOUS = np.frombuffer(b"-ACMGRSVTWYHKDBN", np.uint8)
"""Letters of the four-bit code ncbi4na."""
_VISIBLE_STRING = 0x1A
"""Tag of the text in the ASN.1 of a name."""


@dataclass(frozen=True, eq=False)
class BlastDatabase:
    """One volume of a nucleotide database, in memory.

    Raises:
        ValueError: The index is of another version or of proteins, or does not fit the other two.
    """

    index: bytes
    names: bytes
    sequences: bytes

    def __post_init__(self) -> None:
        version, kind = struct.unpack_from(">ii", self.index)
        if (version, kind) != (_VERSION, _NUCLEOTIDE):
            raise ValueError(f"the index is of version {version} and kind {kind}, not {_VERSION} and {_NUCLEOTIDE}")
        offsets = self._offsets
        if offsets[0, -1] > len(self.names) or offsets[1, -1] > len(self.sequences):
            raise ValueError("the index reaches past the end of the names or sequences")

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return self._offsets.shape[1] - 1

    @cached_property
    def _offsets(self) -> UInt32[np.ndarray, "3 sequences_plus_1"]:
        """Where each name, its sequence, and the list of its ambiguous bases start."""
        at = 8
        for _ in ("title", "date"):
            [length] = struct.unpack_from(">i", self.index, at)
            at += 4 + length
        [count] = struct.unpack_from(">i", self.index, at)
        at += 4 + 8 + 4  # the number of bases and the longest sequence follow
        if len(self.index) < at + 12 * (count + 1):
            raise ValueError("the index is cut off")
        return np.frombuffer(self.index, ">u4", 3 * (count + 1), at).astype(np.uint32).reshape(3, count + 1)

    def titles(self) -> list[str]:
        """Returns the first name of each sequence."""
        offsets = self._offsets[0].tolist()
        return [_first_text(self.names[first:end]) for first, end in zip(offsets, offsets[1:], strict=False)]

    def sequence_at(self, number: int) -> str:
        """Returns the bases of a sequence, with IUPAC codes where they are ambiguous."""
        _, starts, ambiguous = self._offsets
        packed = np.frombuffer(self.sequences, np.uint8, int(ambiguous[number] - starts[number]), int(starts[number]))
        codes = (packed[:, None] >> np.array([6, 4, 2, 0], np.uint8)) & 3
        length = 4 * (len(packed) - 1) + int(packed[-1] & 3)
        bases = _BASES[codes.reshape(-1)[:length]]
        listed = self.sequences[ambiguous[number] : starts[number + 1]]
        for first, count, code in _ambiguities(listed):
            bases[first : first + count] = _AMBIGUOUS[code]
        return bases.tobytes().decode()


def _first_text(name: bytes) -> str:
    at = name.index(_VISIBLE_STRING) + 1
    length = name[at]
    if length & 0x80:  # the length of the length
        size = length & 0x7F
        length, at = int.from_bytes(name[at + 1 : at + 1 + size], "big"), at + size
    return name[at + 1 : at + 1 + length].decode("latin-1").strip()


def _ambiguities(listed: bytes) -> list[tuple[int, int, int]]:
    """Returns start, count and four-bit code of each run of equal ambiguous bases."""
    if not listed:
        return []
    [words] = struct.unpack_from(">I", listed)
    long = bool(words >> 31)  # entries of eight bytes, for sequences over 16 million bases
    if long:
        entries = np.frombuffer(listed, ">u8", (words & 0x7FFFFFFF) // 2, 4)
        return [(int(e & 0xFFFFFFFFFFFF), int(e >> 48 & 0xFFF) + 1, int(e >> 60)) for e in entries.tolist()]
    entries = np.frombuffer(listed, ">u4", words, 4)
    return [(e & 0xFFFFFF, (e >> 24 & 0xF) + 1, e >> 28) for e in entries.tolist()]
