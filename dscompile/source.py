"""Where a node comes from in the user's words: module path, source line, and one phrase with both for messages."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import fx

from dscompile.graph import info

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)\n(?:\s*(.*))?')
_INTERNAL = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)


def source_line(node: fx.Node) -> str:
    """``file.py:12 in forward: y = self.up(x)``, the innermost frame that is the user's, or "".

    A backward node has no frame of its own: it answers with the forward node of the same autograd sequence number.
    """
    own = _user_frame(node)
    if own:
        return own
    number = node.meta.get("seq_nr")
    if number is None:
        return ""
    partners = (n for n in node.graph.nodes if n.meta.get("seq_nr") == number and n.meta.get("stack_trace"))
    return next((f"{line} (backward of it)" for n in partners if (line := _user_frame(n))), "")


def _user_frame(node: fx.Node) -> str:
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [f for f in frames if not f[0].startswith(_INTERNAL)]
    if not users:
        return ""
    path, line, function, code = users[-1]
    return f"{path}:{line} in {function}" + (f": {code.strip()}" if code.strip() else "")


def describe(node: fx.Node) -> str:
    """``%name = aten.op [module.path] at file.py:12 in forward: code``: a node as messages name it."""
    parts = [f"%{node.name} = {target_name(node)}"]
    if fqn := info(node).fqn:
        parts.append(f"[{fqn}]")
    if line := source_line(node):
        parts.append(f"at {line}")
    return " ".join(parts)


def target_name(node: fx.Node) -> str:
    """The operator as PyTorch spells it (``aten.add.Tensor``), or ``placeholder``, ``output``, ``get_attr``."""
    if node.op != "call_function":
        return node.op
    return str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", str(node.target))
