"""Text for ``dscompile train``: which files are read, which are held out, and the batch of every step.

The default corpus is the standard library of the Python that runs: every machine has it, so the demonstration needs no
network. Files come in the order of a hash of their relative path: deterministic, and a bounded read still samples the
whole tree. A batch is a function of (seed, step) alone, so resuming at a step needs no stored data position.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dscompile.errors import RunError, nearest
from dscompile.tools.tokenizer import Tokenizer, train_tokenizer

TRAIN_BYTES = 1_250_000
HELD_OUT_BYTES = 80_000
HELD_OUT_EVERY = 10  # one file in ten is held out; fewer than ten files: the last tenth of each
IGNORED_TARGET = -100  # cross_entropy's default ignore_index
END_OF_FILE = b"\0"

# Not installed everywhere (distributions split these off), or generated tables rather than text.
_SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "site-packages", "dist-packages", "test", "tests"),
        *("idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data"),
    )
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of the training and the held-out text, with the tokeniser that made them."""

    tokenizer: Tokenizer
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    files: int
    held_out_files: int
    read_bytes: int

    @property
    def digest(self) -> str:
        """SHA-256 over all ids: equal digests mean the same text cut the same way."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.held_out.tobytes()).hexdigest()

    @property
    def unigram_nats(self) -> float:
        """Entropy of the held-out ids, in nats per token: the best loss that a guess without context can have."""
        counts = np.bincount(self.held_out[1:])
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())


def load_corpus(path: Path | None, vocab: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read a file, a directory, or (``None``) the standard library; train a tokeniser on it unless one is given.

    Raises:
        RunError: a missing or unreadable path, or nothing to read in it.
    """
    texts, held_out = _read_texts(path)
    train_text, held_out_text = END_OF_FILE.join(texts), END_OF_FILE.join(held_out)
    if len(held_out_text) < 2:
        where = f"--data {path}" if path is not None else sysconfig.get_path("stdlib")
        raise RunError(f"{where}: too little text: {len(train_text)} bytes to train on, {len(held_out_text)} held out.")
    tokenizer = tokenizer or train_tokenizer(train_text, vocab)
    return Corpus(
        tokenizer=tokenizer,
        train=tokenizer.encode(train_text),
        held_out=tokenizer.encode(held_out_text),
        files=len(texts),
        held_out_files=len(held_out),
        read_bytes=len(train_text) + len(held_out_text),
    )


class Batches:
    """Training batches: windows of a shuffled corpus, a new shuffle and offset every epoch."""

    def __init__(self, ids: NDArray[np.int32], *, batch: int, context: int, seed: int) -> None:
        self._ids, self._batch, self._context, self._seed = ids, batch, context, seed
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))
        # One window less than fits, so that every epoch's random offset (below one window) leaves the count the same.
        self.windows = (len(ids) - 1) // context - 1
        if self.windows < batch:
            need = (batch + 1) * context + 1
            raise RunError(
                f"too little text: {len(ids)} training tokens, but --batch {batch} with windows of {context} needs "
                f"{need}. Give more text with --data or a smaller --batch."
            )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of ``step``, both int64 ``[batch, context]``."""
        first = step * self._batch
        rows = [
            self._starts(position // self.windows)[position % self.windows]
            for position in range(first, first + self._batch)
        ]
        block = torch.from_numpy(np.stack([self._ids[s : s + self._context + 1] for s in rows]).astype(np.int64))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        """First positions of the windows of ``epoch``, in the order they are used (kept for the epoch at hand)."""
        if self._order[0] != epoch:
            random = np.random.default_rng((self._seed, epoch))
            offset = random.integers(self._context)
            self._order = (epoch, offset + random.permutation(self.windows) * self._context)
        return self._order[1]


def held_out_batches(ids: NDArray[np.int32], *, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield (inputs, targets, number of real targets) over all held-out ids, each int64 ``[batch, context]``.

    The last batch is padded with ignored targets: its shape, and so the compiled graph, is the same.
    """
    size = batch * context
    for start in range(0, len(ids) - 1, size):
        piece = ids[start : start + size + 1].astype(np.int64)
        count = len(piece) - 1
        inputs = np.zeros(size, dtype=np.int64)
        targets = np.full(size, IGNORED_TARGET, dtype=np.int64)
        inputs[:count], targets[:count] = piece[:-1], piece[1:]
        shape = (batch, context)
        yield torch.from_numpy(inputs).view(shape), torch.from_numpy(targets).view(shape), count


def _read_texts(path: Path | None) -> tuple[list[bytes], list[bytes]]:
    """Return the training texts and the held-out texts, each within its bound."""
    if path is not None and path.is_file():
        return _cut_tails([_read(path, TRAIN_BYTES + HELD_OUT_BYTES)])
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    if not root.is_dir():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise RunError(f"--data {root}: no such file or directory.{nearest(root.name, siblings)}")
    files = _list_files(root, "*.py" if path is None else "*")
    if len(files) < HELD_OUT_EVERY:
        texts = [text for file in files if (text := _read(file, TRAIN_BYTES)) and b"\0" not in text[:8192]]
        if texts:
            return _cut_tails(texts)
    train: list[bytes] = []
    held_out: list[bytes] = []
    room = {id(train): TRAIN_BYTES, id(held_out): HELD_OUT_BYTES}
    for index, file in enumerate(files):
        side = held_out if index % HELD_OUT_EVERY == 0 else train
        if room[id(side)] <= 0:
            continue
        text = _read(file, room[id(side)])
        if text and b"\0" not in text[:8192]:  # a NUL near the start: not a text file
            side.append(text)
            room[id(side)] -= len(text)
    if not train or not held_out:
        raise RunError(f"--data {root}: no text files to train on. Name a text file or a directory of text files.")
    return train, held_out


def _list_files(root: Path, pattern: str) -> list[Path]:
    """Files under ``root`` by the hash of their relative path; no hidden, vendored or generated folders."""
    found: list[tuple[str, Path]] = []
    for file in root.rglob(pattern):
        relative = file.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or _SKIPPED_FOLDERS & set(relative.parts[:-1]) or file.name.startswith("_sysconfigdata"):
            continue
        if file.is_file():
            found.append((hashlib.sha256(relative.as_posix().encode(errors="surrogateescape")).hexdigest(), file))
    return [file for _, file in sorted(found)]


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise RunError(f"--data {path}: cannot read: {error.strerror}.") from None


def _cut_tails(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Hold out the last tenth of each text, cut after a line where one ends near."""
    train, held_out = [], []
    for text in texts:
        cut = len(text) - min(len(text) // HELD_OUT_EVERY, HELD_OUT_BYTES)
        cut = text.rfind(b"\n", cut // 2, cut) + 1 or cut
        train.append(text[:cut])
        held_out.append(text[cut:])
    return train, held_out
