"""A byte-pair tokeniser that is trained on the training files themselves, in a second or two of plain Python.

Bytes are the base alphabet, so every input encodes and decodes without loss; nothing is downloaded.
Training works on the *distinct* words with their counts, keeps the pair counts up to date merge by merge, and finds the
best pair with a lazy heap: its time grows with the vocabulary of the text, not with its length.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]

# Words are bounded, so text without spaces (base64, minified code) cannot make one merge loop quadratic.
WORD = re.compile(rb"\n[ \t]{0,64}| ?[A-Za-z_\x80-\xff]{1,32}| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_\x80-\xff]{1,16}|\s")


RARE = 4  # words seen less often teach no merge worth a slot, and are two thirds of the distinct words


class Tokenizer:
    """Byte-level BPE: ids 0-255 are bytes, id ``256 + i`` is the i-th merge."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = [(int(a), int(b)) for a, b in merges]
        self._ranks = {pair: i for i, pair in enumerate(self.merges)}
        self._pieces = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self._pieces.append(self._pieces[a] + self._pieces[b])

    @property
    def vocab(self) -> int:
        """Number of distinct ids."""
        return len(self._pieces)

    def encode(self, text: bytes) -> NDArray[np.int32]:
        """Map any bytes to a 1-D int32 array of ids; ``decode`` gives the bytes back."""
        words = WORD.findall(text)
        known = {word: self._encode_word(word) for word in set(words)}
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Map ids back to bytes (which need not be whole UTF-8 characters)."""
        return b"".join(self._pieces[i] for i in ids)

    def _encode_word(self, word: bytes) -> list[int]:
        ids, rank_of, none = list(word), self._ranks.get, len(self._ranks)
        while len(ids) > 1:
            rank = min([rank_of(pair, none) for pair in pairwise(ids)])
            if rank == none:
                break
            ids = _replace(ids, self.merges[rank], 256 + rank)
        return ids


def train_tokenizer(text: bytes, vocab: int) -> Tokenizer:
    """Learn at most ``vocab - 256`` merges from ``text`` (fewer if no pair occurs twice); deterministic."""
    counted = sorted((word, count) for word, count in Counter(WORD.findall(text)).items() if count >= RARE)
    words = [list(word) for word, _ in counted]
    weights = [count for _, count in counted]
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += weights[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in totals.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < vocab - 256:
        count, pair = heapq.heappop(heap)
        if -count != totals[pair]:  # stale: a merge changed this pair's count after it was pushed
            continue
        if -count < 2:
            break
        new = 256 + len(merges)
        merges.append(pair)
        changed: set[Pair] = set()
        for index in places.pop(pair):
            old = words[index]
            word = words[index] = _replace(old, pair, new)
            for gone in pairwise(old):
                totals[gone] -= weights[index]
                changed.add(gone)
            for made in pairwise(word):
                totals[made] += weights[index]
                places[made].add(index)
                changed.add(made)
        for other in changed:
            if totals[other] > 0:
                heapq.heappush(heap, (-totals[other], other))
    return Tokenizer(merges)


def _replace(ids: list[int], pair: Pair, new: int) -> list[int]:
    merged: list[int] = []
    position, first, second = 0, *pair
    while position < len(ids):
        if ids[position] == first and position + 1 < len(ids) and ids[position + 1] == second:
            merged.append(new)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    return merged
