"""Text, tokeniser and batches of ``dscompile train``."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dscompile.errors import RunError
from dscompile.tools import data
from dscompile.tools.data import Batches, held_out_batches, load_corpus
from dscompile.tools.tokenizer import Tokenizer, train_tokenizer

TEXT = b"def f(x):\n    return x + 1\n\n\ndef g(y):\n    return f(y) * 2\n" * 50


@pytest.fixture
def folder(tmp_path):
    """Twenty small text files, one hidden, one binary."""
    for index in range(20):
        (tmp_path / f"f{index:02}.txt").write_bytes(b"file %d says " % index + TEXT[:300])
    (tmp_path / ".hidden.txt").write_bytes(b"HIDDEN" * 100)
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0BINARY" * 100)
    return tmp_path


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_every_input_encodes_without_loss(text):
    tokenizer = train_tokenizer(TEXT, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.dtype == np.int32
    assert not len(ids) or ids.max() < tokenizer.vocab


def test_merges_are_the_most_frequent_pairs_and_shorten_the_text():
    tokenizer = train_tokenizer(b"ab ab ab ab ab xy xy xy xy z", 257)
    assert tokenizer.merges == [(ord("a"), ord("b"))] or tokenizer.merges == [(ord(" "), ord("a"))]
    assert tokenizer.encode(b"ab").tolist() in ([256], [97, 98])
    small, large = train_tokenizer(TEXT, 260), train_tokenizer(TEXT, 300)
    assert small.merges == large.merges[: len(small.merges)]
    assert len(large.encode(TEXT)) < len(small.encode(TEXT)) < len(TEXT)
    assert large.vocab <= 300


def test_incremental_counts_choose_what_counting_anew_would_choose():
    words = Counter(data_words(TEXT))
    tokenizer = train_tokenizer(TEXT, 290)
    split = {word: list(word) for word in words}
    for position, pair in enumerate(tokenizer.merges):
        totals = Counter()
        for word, ids in split.items():
            for a, b in itertools.pairwise(ids):
                totals[a, b] += words[word]
        assert totals[pair] == max(totals.values()), f"merge {position}"
        known = Tokenizer(tokenizer.merges[: position + 1])
        split = {word: known.encode(word).tolist() for word in words}


def data_words(text):
    from dscompile.tools.tokenizer import WORD

    return WORD.findall(text)


def test_text_without_repetition_gives_fewer_merges():
    assert train_tokenizer(bytes(range(256)), 1000).vocab == 256


def test_standard_library_is_deterministic_bounded_and_held_out_by_file():
    texts, held_out = data._read_texts(None)
    assert sum(map(len, texts)) <= data.TRAIN_BYTES
    assert sum(map(len, held_out)) <= data.HELD_OUT_BYTES
    assert sum(map(len, texts)) > 200_000
    assert not {t[:2000] for t in texts} & {t[:2000] for t in held_out}
    assert (texts, held_out) == data._read_texts(None)


def test_folder_is_split_by_file_and_skips_binaries_and_hidden_files(folder):
    corpus = load_corpus(folder, 300)
    text = corpus.tokenizer.decode(corpus.train.tolist())
    held_out = corpus.tokenizer.decode(corpus.held_out.tolist())
    assert corpus.files + corpus.held_out_files == 20
    assert text.count(b"says") == corpus.files
    assert held_out.count(b"says") == corpus.held_out_files > 0
    assert b"HIDDEN" not in text + held_out
    assert b"BINARY" not in text + held_out


def test_file_holds_out_its_own_end(tmp_path):
    file = tmp_path / "one.txt"
    file.write_bytes(TEXT)
    corpus = load_corpus(file, 300)
    parts = [corpus.tokenizer.decode(ids.tolist()) for ids in (corpus.train, corpus.held_out)]
    assert b"".join(parts) == TEXT
    assert parts[0].endswith(b"\n")
    assert len(TEXT) // 20 < len(parts[1]) < len(TEXT) // 5


def test_bytes_that_are_not_utf8_are_read(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("naïve café\n".encode("latin-1") * 200)
    corpus = load_corpus(file, 300)
    assert "café" in corpus.tokenizer.decode(corpus.train.tolist()).decode("latin-1")


def test_digest_tells_texts_apart(tmp_path):
    file = tmp_path / "one.txt"
    file.write_bytes(TEXT)
    first = load_corpus(file, 300)
    assert load_corpus(file, 300, first.tokenizer).digest == first.digest
    file.write_bytes(TEXT.replace(b"+", b"-", 1))
    assert load_corpus(file, 300, first.tokenizer).digest != first.digest


def test_unigram_entropy_is_that_of_the_predicted_tokens(tmp_path):
    file = tmp_path / "one.txt"
    file.write_bytes(TEXT)
    corpus = load_corpus(file, 300)
    ids = corpus.held_out.tolist()[1:]
    by_hand = -sum(c / len(ids) * math.log(c / len(ids)) for c in Counter(ids).values())
    assert corpus.unigram_nats == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("content", [b"", b"x", b"x\n"])
def test_nothing_to_read_is_an_error(tmp_path, content):
    file = tmp_path / "one.txt"
    file.write_bytes(content)
    with pytest.raises(RunError, match="too little text"):
        load_corpus(file, 300)


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_bytes(TEXT)
    with pytest.raises(RunError, match=r"Did you mean 'shakespeare\.txt'"):
        load_corpus(tmp_path / "shakespear.txt", 300)


def test_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "a.bin").write_bytes(os.urandom(100) + b"\0")
    with pytest.raises(RunError, match="no text files"):
        load_corpus(tmp_path, 300)


def test_batches_are_a_function_of_seed_and_step():
    ids = np.arange(1000, dtype=np.int32)
    make = lambda seed: Batches(ids, batch=4, context=16, seed=seed)  # noqa: E731
    forwards = [make(0)(step) for step in range(40)]
    backwards = make(0)
    for step in reversed(range(40)):
        assert all(torch.equal(a, b) for a, b in zip(backwards(step), forwards[step], strict=True))
    assert not torch.equal(make(1)(0)[0], forwards[0][0])
    for inputs, targets in forwards:
        assert inputs.shape == targets.shape == (4, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)


def test_an_epoch_takes_every_window_once():
    batches = Batches(np.arange(1000, dtype=np.int32), batch=4, context=16, seed=3)
    starts = torch.cat([batches(step)[0][:, 0] for step in range(2 * batches.windows // 4 + 1)])
    for epoch in range(2):
        part = starts[epoch * batches.windows : (epoch + 1) * batches.windows].sort().values
        assert torch.equal(part.diff(), torch.full((batches.windows - 1,), 16))


def test_too_little_text_for_a_batch_says_how_much_is_needed():
    with pytest.raises(RunError, match=r"needs 81\. .*smaller --batch"):
        Batches(np.arange(80, dtype=np.int32), batch=4, context=16, seed=0)
    assert Batches(np.arange(81, dtype=np.int32), batch=4, context=16, seed=0).windows == 4


@pytest.mark.parametrize("length", [2, 33, 65, 66, 130])
def test_held_out_batches_keep_one_shape_and_the_exact_mean(length):
    random = np.random.default_rng(0)
    ids = random.integers(0, 10, length).astype(np.int32)
    logits = torch.from_numpy(random.normal(size=(10, 10)))  # a bigram model: position does not matter
    total = count = 0.0
    for inputs, targets, real in held_out_batches(ids, batch=4, context=8):
        assert inputs.shape == targets.shape == (4, 8)
        total += float(F.cross_entropy(logits[inputs].flatten(0, 1), targets.flatten())) * real
        count += real
    whole = torch.from_numpy(ids.astype(np.int64))
    assert count == length - 1
    assert total / count == pytest.approx(float(F.cross_entropy(logits[whole[:-1]], whole[1:])), rel=1e-12)
