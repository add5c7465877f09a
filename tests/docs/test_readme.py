"""The documentation's commands and code run.

The README's two installing lines are run whole by ``.ci/run``, which reads them from there; here their pieces are
checked, and everything else is executed.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from dscompile.config import Config
from dscompile.equivalence import Verdict
from dscompile.manager import REGISTRY, PassContext, parse_pipeline, run_pipeline
from dscompile.text import print_graph
from dscompile.text_parse import parse_graph
from dscompile.verify import baseline, verify
from tests.build import trace

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/passes.md",
    "docs/from_deepspeed.md",
    "docs/training.md",
    "docs/zero.md",
    "docs/precision.md",
    "docs/attention.md",
    "docs/gemm.md",
    "docs/checkpoints.md",
    "docs/fused_loss.md",
    "docs/kernels.md",
    "docs/sparse_attention.md",
)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[str]:
    """Every shell command of a document, ``a && b`` apart."""
    lines = [line for block in blocks(document, "sh") for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("&&")]


def section(title: str) -> str:
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def python(*arguments: str, cwd: Path, timeout: int = 500) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("title", ["Run", "Test"])
def test_one_line_does_everything(title: str) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", section(title), re.DOTALL | re.MULTILINE)
    (line,) = block.splitlines()
    make, install, job = line.split(" && ")
    assert make == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install -c constraints.txt -e ")
    assert job.startswith(".venv/bin/")


def test_ci_runs_the_readme_lines() -> None:
    """The heading that ``.ci/run`` looks for must exist, and it must extract exactly the block under it."""
    script = (ROOT / ".ci" / "run").read_text()
    for title in ("Run", "Test"):
        assert f"$(readme {title})" in script
        function = script[script.index("readme() {") : script.index("\n}\n") + 3]
        shell = f"root={shlex.quote(str(ROOT))}\n{function}readme {title}"
        found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert found.count("\n") == 1
        assert found in section(title)


def test_commands_name_what_exists() -> None:
    """Modules, extras, scripts and files that any documented command uses."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {"pip", "pytest", "python", "pre-commit", "ruff", *project["scripts"]}
    for document in DOCUMENTS:
        for command in commands(document):
            words = shlex.split(command)
            if words[0].startswith(".venv/bin/"):
                assert words[0].removeprefix(".venv/bin/") in tools, command
            for extra in re.findall(r"\.\[(\w+)\]", command):
                assert extra in project["optional-dependencies"], command
            if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
                assert (ROOT / (words[words.index("-m") + 1].replace(".", "/") + ".py")).exists(), command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", ["docs/zero.md", "docs/precision.md", "docs/training.md"])
def test_code_trains(document: str, tmp_path: Path) -> None:
    (code,) = blocks(document, "python")
    script = tmp_path / "example.py"
    script.write_text(code)
    python(str(script), cwd=ROOT)


def test_sparse_attention_code_runs(tmp_path: Path) -> None:
    (code,) = blocks("docs/sparse_attention.md", "python")
    script = tmp_path / "example.py"
    script.write_text(code)
    assert "approximate" in python(str(script), cwd=ROOT)


def test_readme_code_trains(tmp_path: Path) -> None:
    """As written, where dscompile is installed; in a bare checkout by the way that the README gives for it."""
    for index, block in enumerate(blocks("README.md", "python")):
        registered = python("-c", f"import importlib.metadata as m; print({ENTRY})", cwd=tmp_path).strip() == "True"
        if not registered:
            block = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dscompile.backend import dscompile\n" + block
            block = block.replace('backend="dscompile"', "backend=dscompile")
        path = tmp_path / f"example{index}.py"
        path.write_text(block)
        python(str(path), cwd=tmp_path)


ENTRY = "'dscompile' in m.entry_points(group='torch_dynamo_backends').names"


def test_readme_dump_is_a_graph() -> None:
    """The graph that the README explains parses, prints back as it stands there, and breaks no rule."""
    (text,) = blocks("README.md", "text")
    graph = parse_graph(text)
    assert print_graph(graph) == text
    assert not verify(graph, baseline(graph), pass_name="none")


def test_the_pass_of_the_guide_works() -> None:
    """The example of docs/passes.md registers, removes a view, and is verified and proved by the manager."""
    (source,) = blocks("docs/passes.md", "python")
    importlib.import_module("dscompile.passes")  # registers ours: only the guide's pass is new, and forgotten below
    known = set(REGISTRY)
    try:
        exec(source, {})
        (name,) = set(REGISTRY) - known
        removed = {text: views_removed(f"{name}{text}") for text in ("", "(keep_outputs=False)")}
    finally:
        for new in set(REGISTRY) - known:
            del REGISTRY[new]
    assert removed == {"": 1, "(keep_outputs=False)": 2}


def views_removed(pipeline: str) -> int:
    """How many of two identity views a pipeline removes: one in the middle, one that is an output."""
    graph = trace(lambda x: (x.view(x.shape) + 1).view(x.shape), torch.randn(3))
    records = run_pipeline(graph, parse_pipeline(pipeline), PassContext(Config()))
    assert records[-1].verdict == Verdict.PROVED.value
    return records[-1].nodes_before - records[-1].nodes_after
