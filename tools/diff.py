"""``dscompile diff``: what changed between two graph texts, for example two passes' files of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dscompile.artifact import read_text
from dscompile.text_diff import diff_text


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A graph's text.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another graph's text.")],
    context: Annotated[int, typer.Option(min=0, help="Unchanged lines shown around a change.")] = 2,
) -> None:
    """Compare two graph texts node by node. Exit status 0: same graph, 1: different, 2: an error.

    Lines are matched by the node they define: '-' removed or old, '+' added or new, '>' moved without change.
    """
    text = diff_text(read_text(before), read_text(after), names=(str(before), str(after)), context=context)
    if text:
        Console(soft_wrap=True).out(text, highlight=False, end="")
        raise typer.Exit(1)
