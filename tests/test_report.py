"""Reports: what a line says, that fallbacks stand out, and that a user's logging is left alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import dscompile
from dscompile.report import REPORTS, GraphReport, Reports, announce

FACTS = {"nodes": 40, "regions": 5, "compiled_regions": 2, "bytes": 2000, "bytes_compiled": 1900}


def test_a_line_says_what_how_checked_and_how_long() -> None:
    report = GraphReport(
        "graph3", "forward", facts=FACTS, seconds={"passes": 0.5, "compile forward": 1.0}, verdict="proved"
    )
    line = report.line()
    assert line == "graph3 forward: 40 nodes, 5 regions (2 compiled, 95.0 % of non-GEMM bytes), proved, 1.5 s"


def test_a_graph_that_moves_nothing_has_no_share() -> None:
    assert "%" not in GraphReport("g", "backward", facts=FACTS | {"bytes": 0, "bytes_compiled": 0}).line()


def test_fallbacks_are_counted_and_the_first_is_named() -> None:
    report = GraphReport("g", "forward", facts=FACTS, fallbacks=["3 nodes from %a to %b: no", "another"])
    assert "2 FALLBACK(S): 3 nodes from %a to %b: no" in report.line()


def test_a_cached_graph_says_so_instead_of_a_time() -> None:
    line = GraphReport("g", "forward", facts=FACTS, seconds={"passes": 9.0}, cached=True).line()
    assert "from the cache" in line
    assert "9.0 s" not in line


def test_json() -> None:
    report = GraphReport("g", "forward", facts=FACTS, seconds={"check": 0.5}, verdict="proved")
    assert json.loads(json.dumps(report.to_json()))["facts"]["nodes"] == 40


def test_reports_are_bounded_and_cleared() -> None:
    reports = Reports(keep=3)
    for index in range(5):
        reports.add(GraphReport(f"g{index}", "forward"))
    assert [r.graph for r in reports.all()] == ["g2", "g3", "g4"]
    reports.clear()
    assert reports.all() == []


@contextmanager
def fresh_process() -> Iterator[logging.Logger]:
    """The package's logger with no handlers anywhere; everything (pytest's handlers too) is put back."""
    log, root = logging.getLogger("dscompile"), logging.getLogger()
    saved = (log.handlers[:], log.level, log.propagate, root.handlers[:])
    log.handlers[:], root.handlers[:] = [], []
    log.setLevel(logging.NOTSET)
    log.propagate = True
    try:
        yield log
    finally:
        log.handlers[:], root.handlers[:] = saved[0], saved[3]
        log.setLevel(saved[1])
        log.propagate = saved[2]


def test_a_summary_is_shown_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_process():
        announce(GraphReport("g7", "forward", facts=FACTS))
        announce(GraphReport("g8", "forward", facts=FACTS))
    shown = capsys.readouterr().err
    assert shown.count("[dscompile] g7") == 1
    assert shown.count("[dscompile] g8") == 1


def test_no_summary_is_shown_if_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_process():
        announce(GraphReport("g9", "forward", facts=FACTS, summary=False))
    assert capsys.readouterr().err == ""
    assert REPORTS.all()[-1].graph == "g9"


def test_a_users_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_process() as log:
        log.setLevel(logging.ERROR)
        announce(GraphReport("g10", "forward", facts=FACTS))
        assert log.level == logging.ERROR
    assert capsys.readouterr().err == ""


def test_a_users_handler_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    with fresh_process() as log:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        announce(GraphReport("g11", "forward", facts=FACTS))
    assert len(seen) == 1
    assert capsys.readouterr().err == ""


def test_a_compilation_reports_both_halves() -> None:
    torch.compiler.reset()
    REPORTS.clear()
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="dscompile", options={"regions": "aten", "summary": False, "cache": False})
    compiled(torch.randn(3, 4)).sum().backward()
    forward, backward = dscompile.last_report()
    assert (forward.kind, backward.kind) == ("forward", "backward")
    assert forward.graph == backward.graph
    assert forward.verdict == backward.verdict == "proved"
    assert forward.passes
    assert forward.facts["bytes_compiled"] == 0  # nothing was compiled, and the line says so
    assert "0.0 % of non-GEMM bytes" in forward.line()
