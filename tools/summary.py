"""The one-screen summary at the end of ``dscompile train``: what was learnt, how fast, and what the compiler did."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dscompile.report import GraphReport, last_report
from dscompile.tools.run_dir import RunDir


def show_summary(
    console: Console,
    *,
    run: RunDir,
    held_out: float,
    unigram: float,
    tokens_per_step: int,
    step_seconds: Sequence[float],
    first_step: float,
    seconds: float,
    peaks_mib: Sequence[float],
    sample: str,
) -> None:
    """Print the summary. Losses are nats per token; times are seconds; ``peaks_mib`` has one entry a rank."""
    reports = last_report()
    table = Table.grid(padding=(0, 2))
    rows = [
        (
            "held-out loss",
            f"{held_out:.3f} nats/token, {held_out / unigram:.2f} of the unigram entropy ({unigram:.3f})",
        ),
        ("time", f"{seconds:.0f} s in all, first step {first_step:.1f} s (compiling)"),
    ]
    if step_seconds:
        step = median(step_seconds)
        rows.append(("speed", f"{tokens_per_step / step:,.0f} tokens/s, {step * 1e3:.0f} ms a step (median)"))
    rows.append(("peak memory", _peaks(peaks_mib)))
    rows += _compiler_rows(reports)
    rows.append(("files", f"{run.path}/: checkpoints/, metrics.csv, config.json, graphs/"))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(Panel(Text(sample), title="sample", title_align="left"))
    console.print(table)


def _peaks(peaks_mib: Sequence[float]) -> str:
    if len(peaks_mib) == 1:
        return f"{peaks_mib[0]:,.0f} MiB"
    return ", ".join(f"{peak:,.0f} MiB (rank {rank})" for rank, peak in enumerate(peaks_mib))


def _compiler_rows(reports: Sequence[GraphReport]) -> list[tuple[str, str]]:
    if not reports:
        return [("compiler", "dscompile compiled nothing")]
    rows = [(f"{report.graph} {report.kind}", _graph(report)) for report in reports]
    rows += [
        ("pass", f"{item['call']}: {item['verdict']}, {item['edits']} edits, {item['seconds'] * 1e3:.0f} ms")
        for report in reports
        for item in report.passes
    ]
    rows.append(("matrix products", reports[0].gemm))
    rows += [("product", line) for report in reports for line in report.facts.get("products", ())]
    fallbacks = [reason for report in reports for reason in report.fallbacks]
    rows.append(("fallbacks", "; ".join(fallbacks) if fallbacks else "none"))
    return rows


def _graph(report: GraphReport) -> str:
    facts = report.facts
    how = "from the cache" if report.cached else f"{sum(report.seconds.values()):.1f} s"
    return (
        f"{facts['nodes']} nodes, {facts['regions']} regions, {facts['compiled_regions']} compiled, "
        f"{report.verdict or 'unchecked'}, {how}"
    )
