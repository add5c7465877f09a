"""``dscompile check`` and the sanitizer: right models pass, a wrong region and a wrong pass are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dscompile.config import Config
from dscompile.errors import ConfigError, VerifyError
from dscompile.program import Program, RegionCode, Step
from dscompile.runtime.execute import bind
from dscompile.runtime.sanitize import difference
from dscompile.tools.check import compare, first_wrong, load_case
from dscompile.tools.cli import run


def model() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), (torch.randn(3, 4),)


def test_a_right_model_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(3, 2), (torch.ones(2, 3),)\n"
    )
    (tmp_path / "aten.json").write_text('{"regions": "aten", "summary": false}')
    monkeypatch.chdir(tmp_path)
    assert run(["check", "mine:make", "--config", "aten.json"]) == 0
    assert "0 differ" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["gpt-9m", "nowhere:make", "os:getcwd"])
def test_bad_targets_are_one_line(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", target]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert target in error


def test_a_wrong_region_is_named() -> None:
    right = "def run(args):\n    x, = args\n    args.clear()\n    y = x * 2\n    return (y,)\n"
    code = RegionCode("k", "aten", right.replace("x * 2", "x * 2.01"), reference=right)
    steps = [Step("y, = region_0([x])", "region_0", ("x",), ("y",), ())]
    program = Program("forward", ("x",), steps, ("y",), {"region_0": "k"}, {"k": code}, labels={"y": "up at m.py:3"})
    assert torch.equal(bind(program)([torch.ones(2)])[0], torch.full((2,), 2.01))
    with pytest.raises(VerifyError, match=r"%y of region_0 differs by .* \[up at m.py:3\]"):
        bind(program, sanitize=True)([torch.ones(2)])


def test_sanitize_sees_dtype_stride_and_non_finite_faults() -> None:
    x = torch.ones(2, 3)
    assert difference(x, x.clone()) == ""
    assert "bfloat16" in difference(x.bfloat16(), x)
    assert "strides" in difference(x.t().contiguous().t(), x)
    assert "non-finite" in difference(x / 0, x)
    assert difference(x / 0, x / 0) == ""
    assert "not equal" in difference(torch.tensor([1]), torch.tensor([2]))


def test_sanitized_training_equals_eager() -> None:
    case = (*model(), {})
    rows = compare(case, Config(sanitize=True, summary=False), 1, 1e-5)
    assert len(rows) == 5
    assert all(error <= allowed for _, error, allowed in rows)


def test_a_wrong_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dscompile import manager, passes
    from dscompile.graph import StepGraph
    from dscompile.manager import Numerics, PassContext, graph_pass

    monkeypatch.setattr(manager, "REGISTRY", dict(manager.REGISTRY))

    @graph_pass("harm", numerics=Numerics.APPROXIMATE)
    def harm(graph: StepGraph, ctx: PassContext) -> None:
        """Count an innocent edit, then halve what GELU returns."""
        assert graph.edit("innocent", next(graph.nodes), "nothing changes") or True
        node = next((n for n in graph.nodes if n.target is torch.ops.aten.gelu.default), None)
        if node is not None and graph.edit("harm", node, "a planted fault"):
            users = list(node.users)
            with graph.graph.inserting_after(node):
                half = graph.insert_call(node.next, torch.ops.aten.mul.Tensor, (node, 0.5), like=node)
            for user in users:
                user.replace_input_with(node, half)

    monkeypatch.setattr(passes, "PIPELINES", {**passes.PIPELINES, "harmed": "harm"})
    case = (*model(), {})
    message = first_wrong(case, Config(pipeline="harmed", verify="off"), 1, 1e-5)
    assert message.startswith("Edit 2 of pipeline 'harmed'")


def test_load_case_knows_the_training_sizes() -> None:
    built, args, kwargs = load_case("gpt-1m")
    assert sum(p.numel() for p in built.parameters()) > 1e5
    assert len(args) == 2
    assert not kwargs
    with pytest.raises(ConfigError, match="neither a size"):
        load_case("gpt")
