"""The ``dscompile`` command: one table of subcommands, each imported when it is called.

``dscompile --help`` imports neither torch nor any command: names and one-line descriptions stand in :data:`COMMANDS`. A
module ``dscompile.tools.NAME`` offers itself as a function with typer annotations; its docstring is the command's help.

A user's mistake is one line on stderr and exit status 2; a graph that a pass broke is the verifier's text and status 1.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from dscompile.errors import DscompileError, VerifyError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("dscompile.tools.train:train", "Train a GPT under the compiler."),
    "lr-find": ("dscompile.tools.lr_find:lr_find", "Find a learning rate by a range test."),
    "check": ("dscompile.tools.check:check", "Compare a compiled model with eager: outputs and every gradient."),
    "opt": ("dscompile.tools.opt:opt", "Run passes on a graph's text and print the result."),
    "diff": ("dscompile.tools.diff:diff", "Compare two graph texts node by node; status 1 if they differ."),
    "config-keys": ("dscompile.tools.config_keys:config_keys", "List DeepSpeed's configuration keys and their states."),
    "hostfile": ("dscompile.tools.hostfile:hostfile", "Print the torchrun commands of a DeepSpeed hostfile."),
    "export": ("dscompile.tools.export:export", "Write a checkpoint's model to one safetensors file."),
    "kernels": ("dscompile.tools.kernels:kernels", "List generated GPU kernels and what they become for each target."),
    "passes": ("dscompile.tools.list_passes:passes", "List every pass: contract, numerics and options."),
}
"""Subcommand -> (module:function, one line of help)."""

_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, of whichever click typer brings


def main(argv: list[str] | None = None) -> None:
    """Run the command line (default: the process's own) and exit with its status: 0, 1 (a finding) or 2 (an error)."""
    arguments = sys.argv[1:] if argv is None else argv
    raise SystemExit(run(arguments or ["--help"]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; every error a user can make is one line on stderr."""
    return reported(lambda: application(arguments)(arguments, prog_name="dscompile", standalone_mode=False))


def reported(call: Callable[[], object]) -> int:
    """The exit status of ``call``: what it returns, or that of the error it ends with, which is written to stderr."""
    stderr = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        status = call()
    except typer.Exit as error:
        return int(error.exit_code)
    except VerifyError as error:
        stderr.print(str(error))
        return 1
    except DscompileError as error:
        stderr.print(f"dscompile: {error}")
        return 2
    except _CLICK_ERROR as error:
        stderr.print(f"dscompile: {error.format_message()}")  # type: ignore[attr-defined]
        return 2
    except BrokenPipeError:  # `dscompile opt ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        stderr.print("dscompile: interrupted")
        return 130
    return status if isinstance(status, int) else 0


def application(arguments: list[str]) -> typer.Typer:
    """The typer application for one command line: only the command it names is imported."""
    called = next((a for a in arguments if not a.startswith("-")), None)
    app = typer.Typer(
        help="DeepSpeed as a compiler: tools for training, checking and looking into what the compiler does.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, (where, description) in COMMANDS.items():
        app.command(name, help=None if name == called else description)(_load(where) if name == called else _not_called)
    return app


def _load(where: str) -> Callable[..., Any]:
    module, _, function = where.partition(":")
    command: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return command


def _not_called() -> None:
    raise AssertionError("a command that the command line does not name was run")


if __name__ == "__main__":
    main()
