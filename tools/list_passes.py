"""``dscompile passes``: every registered pass with its contract and options, as the pipeline parser sees it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dscompile.manager import REGISTRY, PassSpec
from dscompile.passes import PIPELINES


def passes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every pass: numerics class, contract (after, requires, provides), options with defaults, what it does."""
    console = Console()
    entries = [_entry(REGISTRY[name]) for name in sorted(REGISTRY)]
    if as_json:
        Console(soft_wrap=True).out(json.dumps({"passes": entries, "pipelines": PIPELINES}, indent=1), highlight=False)
        return
    table = Table("pass", "numerics", "contract", "options", "what it does", show_lines=True)
    for column in table.columns[:4]:
        column.no_wrap = True
    for e in entries:
        contract = [f"{key} {', '.join(e[key])}" for key in ("after", "requires", "provides") if e[key]]
        options = [f"{name}={value!r}" for name, value in e["options"].items()]
        name = e["name"] + ("\n(optional)" if e["optional"] else "")
        table.add_row(name, e["numerics"], "\n".join(contract), "\n".join(options), e["doc"])
    console.print(table)
    for name, text in PIPELINES.items():
        console.print(f"pipeline {name!r}: {text or '(no passes)'}", markup=False, highlight=False)


def _entry(spec: PassSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "numerics": spec.numerics.value,
        "after": sorted(spec.after),
        "requires": sorted(spec.requires),
        "provides": sorted(spec.provides),
        "optional": spec.optional,
        "options": spec.options,
        "doc": spec.doc.partition("\n")[0],
    }
