"""Where a node comes from in the user's words: module path, source line, and one phrase with both for messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import fx

from dscompile.graph import Phase, info
from dscompile.params import module_path

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)\n(?:\s*(.*))?')
_INTERNAL = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)


def source_line(node: fx.Node) -> str:
    """``file.py:12 in forward: y = self.up(x)``, the innermost frame that is the user's, or "".

    A backward node has no frame of its own: it answers with the forward node of the same autograd sequence number. An
    input answers with its first reader, and a node that AOTAutograd added with what it reads.
    """
    origin, note = _origin(node)
    return f"{_user_frame(origin)}{note}" if origin is not None else ""


def module_of(node: fx.Node) -> str:
    """The fully qualified name of the parameter an input is, or of the module that a node was traced in, or ""."""
    own = info(node).fqn or module_path(node)
    if own or node.op == "placeholder":
        return own
    origin, _ = _origin(node)
    return (info(origin).fqn or module_path(origin)) if origin is not None else ""


def _origin(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The node that has a user frame and stands for ``node``, and how it is related to it."""
    if _user_frame(node):
        return node, ""
    if node.op == "placeholder":
        return _first_with_frame(node.users), " (its first reader)"
    if info(node).phase is Phase.BACKWARD and (number := node.meta.get("seq_nr")) is not None:
        partner = _first_with_frame(n for n in node.graph.nodes if n.meta.get("seq_nr") == number)
        return partner, " (backward of it)"
    operands = list(reversed(node.all_input_nodes))
    readers = (user for operand in operands if operand.op == "placeholder" for user in operand.users)
    return _first_with_frame(operands) or _first_with_frame(readers), ""


def _first_with_frame(nodes: Iterable[fx.Node]) -> fx.Node | None:
    return next((n for n in nodes if _user_frame(n)), None)


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
    if fqn := module_of(node):
        parts.append(f"[{fqn}]")
    if line := source_line(node):
        parts.append(f"at {line}")
    return " ".join(parts)


def target_name(node: fx.Node) -> str:
    """The operator as PyTorch spells it (``aten.add.Tensor``), or ``placeholder``, ``output``, ``get_attr``."""
    if node.op != "call_function":
        return node.op
    return str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", str(node.target))
