"""``dscompile opt``: run a pipeline on a graph's text, as LLVM's ``opt`` does on IR."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dscompile.artifact import is_special, read_table, read_text, write_whole
from dscompile.config import Config
from dscompile.errors import PipelineError, nearest
from dscompile.graph import StepGraph
from dscompile.manager import PassContext, PassRecord, parse_pipeline, run_pipeline
from dscompile.text import diff_text, parse_graph, print_graph, side_table, text_digest


class Show(StrEnum):
    """How a pass's effect is shown."""

    DIFF = "diff"
    TEXT = "text"
    NONE = "none"


def opt(
    input_file: Annotated[Path, typer.Argument(metavar="IN.txt", help="Canonical text of a graph.")],
    pipeline: Annotated[str, typer.Option(help="Passes, e.g. 'canonicalise' or 'a,b(cap=64M)', or a named pipeline.")],
    verify_each: Annotated[
        bool,
        typer.Option("--verify-each/--no-verify-each", help="Verify and prove after each pass, or only at the end."),
    ] = True,
    print_changed: Annotated[Show, typer.Option(help="Show on stderr what each pass changed.")] = Show.NONE,
    stop_after: Annotated[str | None, typer.Option(metavar="PASS", help="Stop after this pass.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Stop editing after N edits (for bisecting).")] = None,
    time: Annotated[bool, typer.Option("--time", help="Show each pass's seconds on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report as JSON instead of the text.")] = False,
    output: Annotated[Path | None, typer.Option("-o", metavar="OUT", help="Write the text to this file.")] = None,
) -> None:
    """Run passes on a graph's text and print the result.

    Side tables (IN.json beside IN.txt) are read if they exist: they hold the data of large constants.
    """
    stdout, stderr = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    table = read_table(input_file)
    graph = parse_graph(read_text(input_file), str(input_file), table["constants"])
    calls = parse_pipeline(pipeline)
    names = [call.spec.name for call in calls]
    if stop_after is not None and stop_after not in names:
        raise PipelineError(
            f"--stop-after: pass {stop_after!r} is not in the pipeline ({', '.join(names) or 'empty'})."
            f"{nearest(stop_after, names)}"
        )
    config = Config.load({"pipeline": pipeline, "verify": "each" if verify_each else "end", "limit": limit})
    shown = print_graph(graph)

    def on_pass(record: PassRecord, after: StepGraph) -> None:
        nonlocal shown
        if print_changed is not Show.NONE:
            text = print_graph(after)
            stderr.out(_change(record, shown, text, print_changed), highlight=False, end="")
            shown = text

    records = run_pipeline(graph, calls, PassContext(config), stop_after=stop_after, on_pass=on_pass)
    if time:
        stderr.print(_times(records))
    result = print_graph(graph)
    if output is not None:
        _write(output, result, graph, table)
    if as_json:
        stdout.out(_report(input_file, calls, records, result), highlight=False)
    elif output is None:
        stdout.out(result, highlight=False, end="")


def _change(record: PassRecord, before: str, after: str, how: Show) -> str:
    if before == after:
        return f"# {record.call}: no change\n"
    head = f"# {record.call}: {record.edits} edits, {record.verdict}\n"
    return head + (after if how is Show.TEXT else diff_text(before, after, names=("before", f"after {record.call}")))


def _times(records: list[PassRecord]) -> Table:
    table = Table("pass", "pass s", "check s", "nodes", "edits", "verdict", title="seconds")
    for r in records:
        nodes = f"{r.nodes_before} -> {r.nodes_after}"
        table.add_row(r.call, f"{r.seconds:.4f}", f"{r.check_seconds:.4f}", nodes, str(r.edits), r.verdict)
    total, checks = sum(r.seconds for r in records), sum(r.check_seconds for r in records)
    table.add_row("total", f"{total:.4f}", f"{checks:.4f}", "", str(sum(r.edits for r in records)), "")
    return table


def _report(path: Path, calls: Any, records: list[PassRecord], result: str) -> str:
    report = {
        "input": str(path),
        "pipeline": ",".join(map(str, calls)),
        "passes": [asdict(record) for record in records],
        "digest": text_digest(result),
    }
    return json.dumps(report, indent=1, default=str)


def _write(path: Path, result: str, graph: StepGraph, table: dict[str, Any]) -> None:
    """Write the text, and beside it what the input's side table knows about the nodes that are left."""
    hint = "Choose another file for -o or make room."
    made = side_table(graph)
    made["nodes"] = {name: {**entry, **table["nodes"].get(name, {})} for name, entry in made["nodes"].items()}
    write_whole(path, result, hint=hint)
    if (table["nodes"] or made["constants"]) and not is_special(path):
        write_whole(path.with_suffix(".json"), json.dumps(made, indent=1) + "\n", hint=hint)
