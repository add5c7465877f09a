"""``dscompile check``: a compiled model against eager, outputs and every gradient, with the first wrong value named."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.errors import ConfigError, VerifyError

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

FLOOR = 1e-3
"""A gradient is judged against the larger of its own norm and this share of the global norm."""


def check(
    target: Annotated[str, typer.Argument(help="module:function returning a model and its inputs, or a GPT size.")],
    config: Annotated[Path | None, typer.Option(help="JSON file of dscompile options.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare (SGD between them).")] = 2,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative error of the loss; 10 x for gradients.")
    ] = 1e-5,
    locate: Annotated[bool, typer.Option(help="On a difference, search for the first wrong value.")] = True,
) -> int:
    """Compare a compiled model with eager: outputs, every gradient, and the first wrong value if there is one.

    TARGET names a function without arguments, importable from the current directory, that returns (model, args) or
    (model, args, kwargs); or one of the sizes of `dscompile train`, e.g. gpt-1m. Status 1 if anything differs.
    """
    console = Console()
    options = Config.load(config)
    case = load_case(target)
    found = compare(case, options, steps, tolerance)
    table = Table("what", "error", "allowed", "", title=f"{target}: compiled against eager, {steps} step(s)")
    for name, error, allowed in sorted(found, key=lambda row: row[2] - row[1])[:20]:
        table.add_row(name, f"{error:.2e}", f"{allowed:.2e}", "[red]DIFFERS" if error > allowed else "[green]ok")
    console.print(table)
    wrong = [name for name, error, allowed in found if not error <= allowed]
    console.print(f"{len(found)} values compared (the 20 nearest to their limit shown), {len(wrong)} differ.")
    if wrong and locate:
        console.print(first_wrong(case, options, steps, tolerance))
    return 1 if wrong else 0


def load_case(target: str) -> Case:
    """The model and inputs that ``target`` names.

    Raises:
        ConfigError: it names nothing, or what it returns is not (model, args[, kwargs]).
    """
    from dscompile.tools.gpt import GPT, SIZES

    torch.manual_seed(0)
    if target in SIZES:
        size = SIZES[target]
        ids = torch.randint(size.vocab, (2, size.context))
        return GPT(size), (ids, ids), {}
    module, colon, function = target.partition(":")
    if not colon:
        raise ConfigError(f"check: {target!r} is neither a size ({', '.join(SIZES)}) nor of the form module:function.")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"check: cannot load {target!r}: {error}.") from None
    finally:
        sys.path.remove("")
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        raise ConfigError(
            f"check: {target!r} must return (model, args) or (model, args, kwargs), got {type(made).__name__}."
        )
    return made[0], tuple(made[1]), dict(made[2]) if len(made) == 3 else {}


def compare(case: Case, config: Config, steps: int, tolerance: float) -> list[tuple[str, float, float]]:
    """Train compiled and eager copies side by side; rows of (what, error, allowed) for losses and gradients."""
    model, args, kwargs = case
    pair = [copy.deepcopy(model) for _ in range(2)]
    torch.compiler.reset()
    compiled = torch.compile(pair[0], backend="dscompile", options=config.model_dump(exclude_defaults=True))
    rows = []
    for step in range(steps):
        losses = [_loss(run, args, kwargs, step) for run in (compiled, pair[1])]
        for loss in losses:
            loss.backward()
        values = [float(loss.detach()) for loss in losses]
        rows.append((f"step {step}: loss", abs(values[0] - values[1]), tolerance * max(abs(values[1]), 1e-12)))
        rows += _gradient_rows(step, pair[0], pair[1], tolerance * 10)
        for one in pair:
            _sgd(one)
    return rows


def _loss(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], step: int) -> Tensor:
    torch.manual_seed(step)
    output = run(*args, **kwargs)
    if isinstance(getattr(output, "loss", None), Tensor):
        loss: Tensor = output.loss
        return loss
    tensors = [t for t in _tensors(output) if t.is_floating_point()]
    if not tensors:
        raise ConfigError("check: the model returns no floating-point tensor to differentiate.")
    return torch.stack([(t.float() + t.float().square()).mean() for t in tensors]).sum()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in _tensors(item)]


def _gradient_rows(
    step: int, found: nn.Module, expected: nn.Module, tolerance: float
) -> list[tuple[str, float, float]]:
    want = {n: p.grad for n, p in expected.named_parameters()}
    norms = [g.double().norm() for g in want.values() if g is not None]
    total = float(torch.stack(norms).norm()) if norms else 0.0
    rows = []
    for name, parameter in found.named_parameters():
        reference = want[name]
        if (parameter.grad is None) != (reference is None):
            rows.append((f"step {step}: {name}.grad is missing on one side", float("inf"), 0.0))
        elif parameter.grad is not None and reference is not None:
            error = float((parameter.grad.double() - reference.double()).norm())
            rows.append(
                (f"step {step}: {name}.grad", error, tolerance * max(float(reference.double().norm()), FLOOR * total))
            )
    return rows


def _sgd(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None


def first_wrong(case: Case, config: Config, steps: int, tolerance: float) -> str:
    """Say what is to blame: a numbered edit of a pass, or a compiled region and the first value it got wrong."""

    def wrong(**changes: Any) -> bool:
        rows = compare(case, config.model_copy(update={"summary": False, "cache": False, **changes}), steps, tolerance)
        return any(not error <= allowed for _, error, allowed in rows)

    if not wrong(regions="aten"):
        try:
            wrong(sanitize=True)
        except Exception as error:
            cause = error if isinstance(error, VerifyError) else error.__cause__ or error
            return f"The passes are right; a compiled region is wrong. {cause}"
        return "The passes are right and each region agrees with PyTorch's kernels on its inputs: rounding adds up."
    if wrong(regions="aten", pipeline="none"):
        return "Wrong even without passes and compiled regions: PyTorch's own trace of this model differs from eager."
    low, high = 0, 1
    while not wrong(regions="aten", limit=high) and high < 1 << 20:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(regions="aten", limit=middle) else (middle, high)
    return (
        f"Edit {high} of pipeline {config.pipeline!r} is the first wrong one; see it with: dscompile opt --limit {high}"
    )
