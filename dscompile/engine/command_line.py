"""DeepSpeed's command-line arguments for a training script."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config FILE`` to a parser; returns it.

    ``--deepspeed`` is there for scripts that look at it; :func:`dscompile.initialize` reads only the file's path.
    """
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed's configuration")
    group.add_argument("--deepspeed", action="store_true", help="for scripts that look at it")
    group.add_argument("--deepspeed_config", type=str, default=None, metavar="FILE", help="JSON configuration")
    return parser
