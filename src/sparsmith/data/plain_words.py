"""Texts as bare words, so that two prints of one text are equal: NFKC, case folded, punctuation and white space collapsed.

Signs of arithmetic are kept in the whole-text form (`3 + 4` and `3 * 4` are two questions) and left out of the words. Chinese and Japanese
write no spaces: there every sign is a word.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EACH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_EACH}]|[^\\W_{_EACH}]+")
_WORD_OR_SIGN = re.compile(f"[{_EACH}]|[^\\W_{_EACH}]+|[+=<>^]|[-*/%](?=\\s*[\\d(])")


def words(text: str) -> list[str]:
    """The words of a text, folded."""
    return _WORD.findall(_folded(text))


def normalised(text: str) -> str:
    """The text by which exact matches are told; empty where it holds no word."""
    return " ".join(_WORD_OR_SIGN.findall(_folded(text)))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


class WordHashes(dict[str, int]):
    """Word -> 64 bits of its BLAKE2, each worked out once: the same in every process."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        self[word] = value
        return value


# odd, so that it has an inverse modulo 2^64 and no word's place is lost
_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class FlatWords:
    """The words of T texts as one row of numbers."""

    hashes: np.ndarray
    """(words,) uint64"""
    owner: np.ndarray
    """(words,) int64, the text of each word, ascending."""

    @classmethod
    def of(cls, texts: Sequence[list[str]], table: WordHashes) -> FlatWords:
        sizes = np.array([len(text) for text in texts], np.int64)
        flat = np.fromiter((table[word] for text in texts for word in text), np.uint64, int(sizes.sum()))
        return cls(flat, np.repeat(np.arange(len(texts)), sizes))

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all runs of `n` words, none across two texts.

        Returns:
            (hash, start) of each run: (runs,) uint64 and (runs,) int64, the place of its first word. Two unlike runs share a hash with
            probability 2^-64.
        """
        runs = max(0, len(self.hashes) - n + 1)
        value = np.zeros(runs, np.uint64)
        base = np.uint64(_BASE)
        with np.errstate(over="ignore"):
            for place in range(n):
                value = value * base + self.hashes[place : place + runs]
        start = np.flatnonzero(self.owner[:runs] == self.owner[len(self.owner) - runs :])
        return value[start], start
