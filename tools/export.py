"""``dscompile export``: a checkpoint's model as one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dscompile.engine.export import export_safetensors


def export(
    directory: Annotated[Path, typer.Argument(help="The run's directory of checkpoints.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    tag: Annotated[
        str | None, typer.Option(help="Which checkpoint; by default the newest.", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint's model to one safetensors file, under plain names, whatever saved it."""
    size = export_safetensors(directory, tag, file)
    Console(soft_wrap=True, markup=False, highlight=False).print(f"{file}: {size:,} bytes")
