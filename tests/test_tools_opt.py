"""The command line over graph texts (``opt``, ``diff``, ``passes``), Before/Expected files, and a run's artifact."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import Hand

from dscompile.artifact import Artifact, write_whole
from dscompile.config import Config
from dscompile.errors import RunError, TextError
from dscompile.manager import REGISTRY, PassContext, graph_pass, parse_pipeline, run_pipeline
from dscompile.text import diff_text, parse_graph, print_graph, text_digest
from dscompile.tools.cli import COMMANDS, run

GRAPHS = Path(__file__).parent / "graphs"
PAIRS = sorted(p.name.removesuffix(".expected.txt") for p in GRAPHS.glob("*.expected.txt"))
VIEWS = str(GRAPHS / "views.txt")


def text_of(name: str) -> str:
    """A graph file without its comments."""
    return print_graph(parse_graph((GRAPHS / name).read_text()))


@pytest.fixture
def wrong_pass():
    """A pass that calls itself bitwise and turns ``x * 2.0`` into ``x * 3.0``."""

    @graph_pass("wrong_for_test")
    def wrong(graph, ctx):
        for node in graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor and graph.edit("break", node, why="a test"):
                node.args = (node.args[0], 3.0)

    yield "wrong_for_test"
    del REGISTRY["wrong_for_test"]


@pytest.mark.parametrize("name", PAIRS)
def test_before_and_expected(name: str, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out.txt"
    assert run(["opt", str(GRAPHS / f"{name}.txt"), "--pipeline", "canonicalise", "-o", str(out)]) == 0
    assert diff_text(text_of(f"{name}.expected.txt"), out.read_text()) == ""
    assert capfd.readouterr().out == ""


def test_there_are_pairs() -> None:
    assert PAIRS == ["repeats", "views"]


def test_opt_prints_the_text(capfd) -> None:
    assert run(["opt", VIEWS, "--pipeline", "none"]) == 0
    assert capfd.readouterr().out == text_of("views.txt")


def test_opt_shows_changes_and_times(tmp_path: Path, capfd) -> None:
    out = str(tmp_path / "out.txt")
    assert run(["opt", VIEWS, "--pipeline", "canonicalise", "--print-changed", "diff", "--time", "-o", out]) == 0
    err = capfd.readouterr().err
    assert "- %alias = aten.alias.default(%t)" in err
    assert "edits, proved" in err
    assert "total" in err
    assert run(["opt", VIEWS, "--pipeline", "canonicalise(no_ops=False)", "--print-changed", "text"]) == 0
    assert "# canonicalise(no_ops=False): no change" in capfd.readouterr().err


def test_opt_json_limit_and_stop(capfd) -> None:
    assert run(["opt", VIEWS, "--pipeline", "canonicalise,canonicalise", "--stop-after", "canonicalise", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [p["name"] for p in report["passes"]] == ["canonicalise"]
    assert report["passes"][0]["verdict"] == "proved"
    assert report["digest"] == text_digest(text_of("views.expected.txt"))
    assert run(["opt", VIEWS, "--pipeline", "canonicalise", "--limit", "0"]) == 0
    assert capfd.readouterr().out == text_of("views.txt")


@pytest.mark.parametrize("flag", ["--verify-each", "--no-verify-each"])
def test_a_wrong_pass_is_status_1(wrong_pass: str, flag: str, capfd) -> None:
    assert run(["opt", VIEWS, "--pipeline", wrong_pass, flag]) == 1
    assert wrong_pass in capfd.readouterr().err


def test_no_verify_each_checks_only_the_end(wrong_pass: str, capfd) -> None:
    """With the wrong pass first, only --verify-each stops before the second pass."""
    for flag, seen in (("--verify-each", False), ("--no-verify-each", True)):
        line = ["opt", VIEWS, "--pipeline", f"{wrong_pass},canonicalise", flag, "--print-changed", "text"]
        assert run(line) == 1
        assert (f"# {wrong_pass}: 2 edits" in capfd.readouterr().err) is seen


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["opt", "missing.txt", "--pipeline", "none"], "missing.txt: cannot read: No such file"),
        (["opt", VIEWS, "--pipeline", "canonicalize"], "Did you mean 'canonicalise'?"),
        (["opt", VIEWS, "--pipeline", "canonicalise(cs=True)"], "no option 'cs'. Did you mean 'cse'?"),
        (["opt", VIEWS, "--pipeline", "canonicalise", "--stop-after", "canonical"], "Did you mean 'canonicalise'?"),
        (["opt", VIEWS, "--pipeline", "none", "-o", "/proc/nowhere/x.txt"], "/proc/nowhere/x.txt: cannot write"),
        (["opt", VIEWS], "--pipeline"),
        (["opt", VIEWS, "--pipeline", "none", "--limit", "-1"], "--limit"),
        (["opt", str(GRAPHS), "--pipeline", "none"], "cannot read: Is a directory"),
        (["diff", VIEWS], "B"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_user_errors_are_one_line(line: list[str], message: str, capfd) -> None:
    assert run(line) == 2
    streams = capfd.readouterr()
    assert message in streams.err
    assert streams.err.count("\n") == 1
    assert streams.out == ""


def test_a_damaged_file_names_line_and_column(tmp_path: Path, capfd) -> None:
    path = tmp_path / "bad.txt"
    path.write_text((GRAPHS / "views.txt").read_text().replace("aten.t.default", "aten.tt.default", 1))
    assert run(["opt", str(path), "--pipeline", "none"]) == 2
    assert f"{path}:7:6: unknown operator 'aten.tt'" in capfd.readouterr().err


def test_diff_has_the_status_of_diff(capfd) -> None:
    assert run(["diff", VIEWS, VIEWS]) == 0
    assert capfd.readouterr().out == ""
    assert run(["diff", VIEWS, str(GRAPHS / "views.expected.txt"), "--context", "0"]) == 1
    out = capfd.readouterr().out
    assert out.endswith("# 1 removed, 1 changed\n")
    assert "+ %mul = aten.mul.Tensor(%t, 2.0)" in out


def test_passes_lists_the_registry(capfd) -> None:
    assert run(["passes", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [p["name"] for p in listed["passes"]] == sorted(REGISTRY)
    options = {p["name"]: p["options"] for p in listed["passes"]}
    assert options["canonicalise"] == REGISTRY["canonicalise"].options
    assert run(["passes"]) == 0
    assert "canonicalise" in capfd.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dscompile.tools.cli import run; status = run(['--help']); "
        "sys.exit(status or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


# -- the artifact ------------------------------------------------------------------------------------------------------


def small_graph():
    h = Hand()
    x = h.input("x", 4)
    y = h.call(torch.ops.aten.alias.default, x)
    return h.done([h.call(torch.ops.aten.sin.default, y)])


def test_artifact_of_a_run(tmp_path: Path) -> None:
    config = Config(pipeline="canonicalise")
    graph = small_graph()
    writer = Artifact(tmp_path, config).graph("frame 0")
    writer.traced(graph)
    ctx = PassContext(config)
    run_pipeline(graph, parse_pipeline(config.pipeline), ctx, on_pass=writer.after_pass)
    writer.program("forward", "print(1)\n")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["graphs"]["frame_0"]["complete"] is False
    writer.close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    entry = manifest["graphs"]["frame_0"]
    assert entry["complete"] is True
    assert manifest["config"] == config.model_dump()
    assert manifest["torch"] == torch.__version__
    assert [step["file"] for step in entry["steps"]] == ["frame_0/00-traced.txt", "frame_0/01-canonicalise.txt"]
    assert entry["steps"][1]["verdict"] == "proved"
    assert entry["steps"][1]["edits"] == 1
    for step in entry["steps"]:
        text = (tmp_path / step["file"]).read_text()
        assert text_digest(text) == step["digest"]
        assert print_graph(parse_graph(text)) == text
        assert "nodes" in json.loads((tmp_path / step["file"]).with_suffix(".json").read_text())
    assert (tmp_path / "frame_0/forward.py").read_text() == "print(1)\n"
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(["diff", *(str(tmp_path / step["file"]) for step in entry["steps"])]) == 1


def test_graphs_of_one_run_share_the_manifest(tmp_path: Path) -> None:
    first = Artifact(tmp_path).graph("g")
    second = Artifact(tmp_path).graph("g")
    first.traced(small_graph())
    second.traced(small_graph())
    first.close()
    graphs = json.loads((tmp_path / "manifest.json").read_text())["graphs"]
    assert {name: (len(g["steps"]), g["complete"]) for name, g in graphs.items()} == {"g": (1, True), "g-2": (1, False)}


def test_another_runs_manifest_is_replaced(tmp_path: Path) -> None:
    Artifact(tmp_path).graph("old")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["run"]["pid"] = -1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    Artifact(tmp_path).graph("new")
    assert list(json.loads((tmp_path / "manifest.json").read_text())["graphs"]) == ["new"]


def test_an_unwritable_directory_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/manifest.json: cannot write: .* Choose another directory"):
        Artifact(tmp_path / "file")


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Artifact(tmp_path).graph("g")

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"00-traced.txt: cannot write: No space left on device"):
        writer.traced(small_graph())
    monkeypatch.undo()
    assert not (tmp_path / "g/00-traced.txt").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["graphs"]["g"]["steps"] == []


def test_devices_and_links_are_written_through(tmp_path: Path) -> None:
    """A rename would replace a pipe, a device or a link by a regular file."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(["opt", VIEWS, "--pipeline", "none", "-o", str(pipe)]) == 0
        assert os.read(reader, 1 << 16).decode() == text_of("views.txt")
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "real").write_text("old")
    link.symlink_to(tmp_path / "real")
    write_whole(link, "new", hint="")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "real"]


def test_opt_finds_the_side_table(tmp_path: Path, capfd) -> None:
    graph = small_graph()
    graph.module.register_buffer("table", torch.arange(100))
    with graph.graph.inserting_before(graph.output_node):
        graph.graph.get_attr("table")
    Artifact(tmp_path).graph("g").traced(graph)
    path, out = tmp_path / "g/00-traced.txt", tmp_path / "out.txt"
    assert run(["opt", str(path), "--pipeline", "none", "-o", str(out)]) == 0
    assert out.read_text() == path.read_text()
    table = json.loads(out.with_suffix(".json").read_text())
    assert len(table["constants"]) == 1
    assert "build.py" in table["nodes"]["sin_default"]["source"]  # the text has no source lines: it is the input's
    with pytest.raises(TextError):
        parse_graph(path.read_text())
