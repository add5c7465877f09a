"""Signatures of collectives, and the message that says what differs."""

from __future__ import annotations

import pickle

import pytest

from dscompile.runtime.agree import compare, signature

GATHER = ["all_gather dp wte.weight fp32[512,64]", "all_gather dp h.0.mlp.weight fp32[64,256]", "reduce dp wte.weight"]


def test_signature_depends_on_lines_and_order() -> None:
    assert signature(GATHER) == signature(iter(GATHER))
    assert len({signature(GATHER), signature(GATHER[::-1]), signature(GATHER[:2]), signature(["".join(GATHER)])}) == 4
    assert len(signature(GATHER)) == 16


def test_signature_without_collectives_is_empty() -> None:
    assert signature([]) == ""


def test_signature_carries_its_lines_and_pickles() -> None:
    again = pickle.loads(pickle.dumps(signature(GATHER)))
    assert again == signature(GATHER)
    assert again.texts == tuple(GATHER)


@pytest.mark.parametrize(
    ("theirs", "position", "relation"),
    [
        ([GATHER[1], GATHER[0], GATHER[2]], "collective 1 (of 3 and 3)", "in another order"),
        (GATHER[:2], "collective 3 (of 3 and 2)", "rank 0 has one collective more"),
        ([*GATHER, "barrier"], "collective 4 (of 3 and 4)", "rank 1 has one collective more"),
        ([GATHER[0], GATHER[2]], "collective 2 (of 3 and 2)", "rank 0 has one collective more"),
        (
            [GATHER[0], "all_gather dp h.0.mlp.weight bf16[64,256]", GATHER[2]],
            "collective 2 (of 3",
            "the rest is equal",
        ),
        (["a", "b"], "collective 1 (of 3 and 2)", "3 collectives differ"),
    ],
)
def test_compare_names_the_first_difference(theirs: list[str], position: str, relation: str) -> None:
    text = compare(GATHER, theirs, names=("rank 0", "rank 1"))
    at = int(position.split()[1]) - 1
    assert position in text
    assert relation in text
    assert f"rank 0: {(*GATHER, '(no more collectives)')[at]}" in text
    assert f"rank 1: {(*theirs, '(no more collectives)')[at]}" in text


def test_compare_of_equal_lists() -> None:
    assert compare(GATHER, tuple(GATHER)) == ""
