"""``dscompile config-keys``: every key of a DeepSpeed configuration and what becomes of it here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console

from dscompile.engine.key_check import KEYS
from dscompile.engine.keys import UNSET, Key


def config_keys(
    key: Annotated[str | None, typer.Argument(help="Only keys that contain this.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/from_deepspeed.md.")] = False,
) -> None:
    """List DeepSpeed's configuration keys: default, acted on, accepted or refused, and why."""
    chosen = [k for k in KEYS.values() if key is None or key in k.path]
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if markdown:
        console.out("\n".join(markdown_tables(chosen)), highlight=False)
        return
    for each in chosen:
        console.print(f"{each.path} (default {_default(each)}): {each.state.value}: {each.why}")


def markdown_tables(rows: list[Key]) -> Iterator[str]:
    """The lines of one table a section, in the order of the rows' first appearance."""
    order = list(dict.fromkeys(_title(k) for k in rows))
    for title, group in groupby(sorted(rows, key=lambda k: order.index(_title(k))), key=_title):
        yield from (
            f"### {title}",
            "",
            "| key | default | state | what it does here, or why not |",
            "|---|---|---|---|",
        )
        for key in group:
            yield f"| `{key.path}` | `{_default(key)}` | {key.state.value} | {key.why.replace('|', '/')} |"
        yield ""


def _title(key: Key) -> str:
    return f"`{key.path.split('.')[0]}`" if "." in key.path else "Top level"


def _default(key: Key) -> str:
    return "-" if key.default is UNSET else json.dumps(key.default)
