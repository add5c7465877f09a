"""docs/from_deepspeed.md: its table is the code's, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist

from dscompile.engine.key_check import KEYS
from dscompile.tools.cli import run
from dscompile.tools.config_keys import markdown_tables

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "from_deepspeed.md"


def test_the_table_is_generated() -> None:
    text = DOCUMENT.read_text()
    table = text[text.index("### ") :]
    assert table.strip() == "\n".join(markdown_tables(list(KEYS.values()))).strip(), (
        "write the output of `dscompile config-keys --markdown` below 'Every key'"
    )


def test_every_key_has_a_row() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| `[^`]*` \| (acted on|accepted|refused) \| .{15,} \|$", DOCUMENT.read_text(), re.M
    )
    assert [path for path, _ in rows] == list(dict.fromkeys(path for path, _ in rows))
    assert {path: state for path, state in rows} == {path: key.state.value for path, key in KEYS.items()}


def test_the_example_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    space: dict[str, object] = {}
    try:
        exec(block, space)
        assert space["engine"].global_steps == 3  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()


def test_the_command_finds_keys(capsys: object) -> None:
    assert run(["config-keys", "offload_param.device"]) == 0
    out = capsys.readouterr().out  # type: ignore[attr-defined]
    assert out.startswith('zero_optimization.offload_param.device (default "none"): refused: there is no offload')
    assert out.count("\n") == 1
