"""``dscompile hostfile``: DeepSpeed's hostfile as the torchrun command of each host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dscompile.engine.hostfile import read_hostfile, select, torchrun_commands


def hostfile(
    file: Annotated[Path, typer.Argument(help="Lines of 'host slots=N'.")],
    script: Annotated[list[str], typer.Argument(help="The training script and its arguments, after --.")],
    include: Annotated[str, typer.Option(help="Only these, e.g. worker-0@worker-1:0,2.")] = "",
    exclude: Annotated[str, typer.Option(help="All but these.")] = "",
    port: Annotated[int, typer.Option(help="Port on the first host.")] = 29500,
) -> None:
    """Print the torchrun command to start on each host: one line a host, HOST: COMMAND.

    Nothing is started: use your cluster's own way of running a command on each host.
    """
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for host, command in torchrun_commands(select(read_hostfile(file), include, exclude), script, port).items():
        console.print(f"{host}: {command}")
