"""``docs/threads.md`` names tests that exist, and says of every thread where it is tested or that it is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "threads.md").read_text().splitlines()
    if re.match(r"\| \w.*#\d", line)
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace(" ", "-") for row in ROWS])
def test_a_thread_has_its_test_or_says_what_is_missing(row: list[str]) -> None:
    _, wanted, here = row
    assert wanted
    named = re.findall(r"`(tests/[^`]+)`", here)
    assert named or here.startswith("not yet: ")
    for name in named:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert not function or function in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, name


def test_the_table_was_read() -> None:
    assert len(ROWS) > 25
