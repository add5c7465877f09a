"""Two reductions in one walk over a long row, where the second reads the first.

``sum(exp(x - max(x)))``: Milakov and Gimelshein, 2018. ``sum((x - mean(x))**2)``: Chan, Golub and LeVeque, 1979. Every
lane of the block keeps its own running pair; the lanes are combined at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.codegen.tile.ir import COL, Reduce
from dscompile.codegen.triton_backend.body import Body


@dataclass
class Online:
    """Lines before the loop, in it, and after it."""

    start: list[str]
    turn: list[str]
    after: list[str]


def online(body: Body, first: Reduce, second: Reduce, value: str) -> Online:
    """The lines that make both reductions, and note their names in ``body.results``."""
    return _softmax(body, first, second, value) if first.how == "max" else _variance(body, first, second, value)


def _softmax(body: Body, first: Reduce, second: Reduce, value: str) -> Online:
    top, total, new = body.name("top"), body.name("total"), body.name("new_top")
    body.helpers.add("larger")
    mask = body.mask(frozenset({COL}))
    seen = f"tl.where({mask}, {value}, {_LOWEST})" if mask else value
    term = f"tl.exp({value} - {new})"
    term = f"tl.where({mask}, {term}, 0.0)" if mask else term
    biggest, result = body.name(body.hints.get(first, "max")), body.name(body.hints.get(second, "sum"))
    body.results[first], body.results[second] = biggest, result
    return Online(
        [
            f"{top} = tl.full([ROW_BLOCK, COL_BLOCK], {_LOWEST}, tl.float32)",
            f"{total} = tl.full([ROW_BLOCK, COL_BLOCK], 0.0, tl.float32)",
        ],
        [f"{new} = larger({top}, {seen})", f"{total} = {total} * tl.exp({top} - {new}) + {term}", f"{top} = {new}"],
        [
            f"{biggest} = {body.across('max', top, 1)}",
            f"{result} = tl.sum({total} * tl.exp({top} - {biggest}), axis=1, keep_dims=True)",
        ],
    )


_LOWEST = "-3.4028234663852886e38"
"""The lowest fp32: unlike -inf, its difference to itself is 0, not NaN."""


def _variance(body: Body, first: Reduce, second: Reduce, value: str) -> Online:
    count, mean, squares, delta = (body.name(n) for n in ("count", "mean", "squares", "delta"))
    mask = body.mask(frozenset({COL}))
    one = f"tl.where({mask}, 1.0, 0.0)" if mask else "1.0"
    term = f"tl.where({mask}, {value} - {mean}, 0.0)" if mask else f"{value} - {mean}"
    total, result, middle = (
        body.name(body.hints.get(first, "sum")), body.name(body.hints.get(second, "squared")), body.name("middle"),
    )  # fmt: skip
    body.results[first], body.results[second] = total, result
    zeros = "tl.full([ROW_BLOCK, COL_BLOCK], 0.0, tl.float32)"
    return Online(
        [f"{count} = {zeros}", f"{mean} = {zeros}", f"{squares} = {zeros}"],
        [
            f"{count} = {count} + {one}",
            f"{delta} = {term}",
            f"{mean} = {mean} + {delta} / tl.maximum({count}, 1.0)",
            f"{squares} = {squares} + {delta} * ({value} - {mean})",
        ],
        [
            f"{total} = tl.sum({count} * {mean}, axis=1, keep_dims=True)",
            f"{middle} = {mean} - {total} / COLS",
            f"{result} = tl.sum({squares} + {count} * {middle} * {middle}, axis=1, keep_dims=True)",
        ],
    )
