"""Mistakes of users: each is one clear error that names what, where and what to do, or is done right."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dscompile.backend import dscompile
from dscompile.config import Config
from dscompile.errors import ConfigError, DscompileError, PipelineError, UnsupportedError
from dscompile.torch_compat import FakeTensorMode


def raised(call):
    """The error of ours that a call ends with, from under Dynamo's wrapping."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    error = caught.value
    while error is not None and not isinstance(error, DscompileError):
        error = error.__cause__ or error.__context__
    assert error is not None, caught.value
    assert str(error).count("\n") == 0
    assert str(error).splitlines()[0] in str(caught.value)  # Dynamo's text shows ours
    return error


# -- options -----------------------------------------------------------------------------------------------------------

WRONG = [
    ({"verfy": "each"}, ["'verfy'", "Did you mean 'verify'?"]),
    ({"verify": "eech"}, ["'verify'", "'each', 'end' or 'off'", "'eech'"]),
    ({"verify": None}, ["'verify'", "None"]),
    ({"limit": -1}, ["'limit'", "greater than or equal to 0"]),
    ({"limit": "3"}, ["'limit'", "integer", "'3'"]),
    ({"limit": True}, ["'limit'", "integer"]),
    ({"donate": 1}, ["'donate'", "boolean"]),
    ({"dump": 5}, ["'dump'", "string"]),
    ({"dump": ""}, ["'dump'", "at least 1"]),
    ({"regions": {"kind": "auto"}}, ["'regions'", "'auto', 'whole' or 'aten'"]),
]


@pytest.mark.parametrize(("options", "parts"), WRONG, ids=[str(o) for o, _ in WRONG])
def test_wrong_option_names_key_value_and_remedy_wherever_it_comes_from(tmp_path, options, parts):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend=dscompile, options=options)
    for where, call in (
        ("options", lambda: Config.load(options)),
        ("options", lambda: compiled(torch.ones(1, 2))),
        (str(file), lambda: Config.load(file)),
        (str(file), lambda: Config.load(str(file))),
    ):
        error = raised(call)
        assert isinstance(error, ConfigError)
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{where}: ")
        for part in parts:
            assert part in str(error)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", ":1:2: not valid JSON"),
        (b"", ":1:1: not valid JSON"),
        (b"[1]", "expected a JSON object of options, got list"),
        (b'{"limit": NaN}', "'limit'"),
        (b"\xff{}", "not a JSON text file"),
    ],
)
def test_file_that_is_no_configuration(tmp_path, content, part):
    file = tmp_path / "options.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"options\.json") as caught:
        Config.load(file)
    assert part in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        Config.load(tmp_path)


@pytest.mark.parametrize("source", [[1], 5, [("verify", "each")]])
def test_something_else_than_a_mapping(source):
    with pytest.raises(ConfigError, match=type(source).__name__):
        Config.load(source)


@pytest.mark.parametrize(
    ("pipeline", "parts"),
    [
        ("canonicalize", ["'canonicalize'", "Did you mean 'canonicalise'?"]),
        ("canonicalise(cze=True)", ["'cze'", "Did you mean 'cse'?"]),
        ("canonicalise(cse=3)", ["'cse'", "bool"]),
        ("canonicalise(", ["'canonicalise('"]),
    ],
)
def test_wrong_pipeline(pipeline, parts):
    compiled = torch.compile(nn.Linear(2, 2), backend=dscompile, options={"pipeline": pipeline})
    error = raised(lambda: compiled(torch.ones(1, 2)))
    assert isinstance(error, PipelineError)
    for part in parts:
        assert part in str(error)


def test_mode():
    compiled = torch.compile(nn.Linear(2, 2), backend=dscompile, mode="max-autotune")
    assert "no mode 'max-autotune'; use options=" in str(raised(lambda: compiled(torch.ones(1, 2))))


def test_unwritable_dump(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    compiled = torch.compile(nn.Linear(2, 2), backend=dscompile, options={"dump": str(tmp_path / "file" / "d")})
    message = str(raised(lambda: compiled(torch.ones(1, 2))))
    assert "file/d/manifest.json: cannot write" in message
    assert "option 'dump'" in message


def test_unsupported_device_names_it_and_the_input():
    def moved(gm, inputs):
        with FakeTensorMode():
            return dscompile(gm, [nn.Parameter(torch.empty(value.shape, device="xpu")) for value in inputs])

    error = raised(lambda: torch.compile(nn.Linear(2, 2), backend=moved)(torch.ones(1, 2)))
    assert isinstance(error, UnsupportedError)
    assert "device xpu:0 (parameter weight); move model and inputs to 'cpu'" in str(error)


# -- models that change their parameters -------------------------------------------------------------------------------


class Changes(nn.Module):
    """A linear layer and a scale, which ``change`` changes during forward."""

    def __init__(self, change, late=False):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.inner = nn.Module()
        self.inner.scale = nn.Parameter(torch.ones(3))
        self.change = change
        self.late = late

    def forward(self, x):
        if not self.late:
            self.change(self, x)
        y = self.linear(x)
        if self.late:
            self.change(self, x)
            return y
        return y * self.inner.scale


@torch.no_grad()
def halve(model, x):
    model.inner.scale.mul_(0.5)


def halve_data(model, x):
    model.inner.scale.data.mul_(0.5)


@torch.no_grad()
def copy(model, x):
    model.inner.scale.copy_(x.mean(0))


@torch.no_grad()
def average(model, x):
    model.inner.scale.lerp_(model.linear.weight.mean(0), 0.25)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", [halve, halve_data, copy, average])
def test_parameter_changed_in_place_is_right(change, late):
    torch.compiler.reset()
    torch.manual_seed(0)
    eager, compiled = Changes(change, late), Changes(change, late)
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, backend=dscompile, options={"regions": "aten", "summary": False})
    for _ in range(3):
        x = torch.randn(4, 3)
        expected, got = eager(x), run(x)
        torch.testing.assert_close(got, expected)
        expected.sin().sum().backward()
        got.sin().sum().backward()
        for (name, want), have in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(have, want, msg=name)
            assert (have.grad is None) == (want.grad is None), name  # None is not zero: weight decay skips it
            if want.grad is not None:
                torch.testing.assert_close(have.grad, want.grad, msg=name)


def test_replaced_data_is_refused_by_name_and_line():
    def replace(model, x):
        model.inner.scale.data = model.inner.scale.data * 2

    run = torch.compile(Changes(replace), backend=dscompile)
    error = raised(lambda: run(torch.randn(4, 3)))
    assert isinstance(error, UnsupportedError)
    assert "parameter inner.scale" in str(error)
    assert "test_bad_input.py:" in str(error)
    assert "copy_" in str(error)
