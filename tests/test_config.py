"""The configuration: what it accepts, what its errors say, and what its digest depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscompile.config import Config
from dscompile.errors import ConfigError


def test_defaults() -> None:
    assert Config.load() == Config.load({}) == Config()


def test_a_config_is_taken_as_it_is() -> None:
    config = Config(regions="aten")
    assert Config.load(config) is config


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().donate = False


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("pipelin", "pipeline"), ("Regions", "regions"), ("donated", "donate"), ("sanitise", "sanitize")],
)
def test_an_unknown_option_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load({wrong: 1})
    message = str(caught.value)
    assert f"unknown option {wrong!r}" in message
    assert f"Did you mean {right!r}?" in message
    assert "Valid options: pipeline, verify" in message


def test_nothing_near_means_no_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load({"zzzzzz": 1})
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"regions": "every"},
        {"regions": None},
        {"donate": "yes"},
        {"donate": 1},
        {"limit": -1},
        {"limit": 1.5},
        {"limit": True},
        {"limit": "3"},
        {"dump": 3},
        {"cache": None},
    ],
    ids=str,
)
def test_a_wrong_value_names_option_and_value(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError) as caught:
        Config.load(options)
    message = str(caught.value)
    assert f"option {name!r}" in message
    assert repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("source", [["regions"], 3, "", [("regions", "aten")]], ids=str)
def test_something_else_than_a_mapping_is_a_config_error(source: Any) -> None:
    with pytest.raises(ConfigError):
        Config.load(source)


def test_from_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"regions": "whole", "limit": 3, "donate": False}))
    assert Config.load(path) == Config.load(str(path)) == Config(regions="whole", limit=3, donate=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"regions": }', ":1:13: not valid JSON"),
        (b'{\n "regions": "aten",\n}', ":3:1: not valid JSON"),
        (b"[1]", "expected a JSON object of options, got list"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not a JSON text file"),
        (b'{"regoins": "aten"}', "Did you mean 'regions'?"),
        (b'{"limit": "many"}', "option 'limit'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ConfigError) as caught:
            Config.load(path)
        assert str(path) in str(caught.value)


OTHER: dict[str, Any] = {
    "pipeline": "canonicalise", "verify": "end", "limit": 3, "regions": "aten", "donate": False, "rng": "fused",
    "sanitize": True, "kernels": "inductor", "gemm": "default", "attention": "aten",
    "norm_backward": "inductor", "buffers": "off", "fused_loss": "off", "cache": False, "summary": False,
    "zero": {"stage": 2}, "precision": {"param_dtype": "bf16"}, "sparse_attention": {"mode": "bigbird"},
    "rank_timeout": 5.0, "step_entry": False, "recompute": {"gelu_checkpoint": True},
}  # fmt: skip
"""For every option that matters to a compiled program, a value that is not its default."""


def test_the_digest_depends_on_every_option_but_output_only_ones() -> None:
    digests = {name: Config.load({name: value}).digest() for name, value in OTHER.items()}
    assert len({*digests.values(), Config().digest()}) == len(OTHER) + 1
    assert Config(dump="somewhere").digest() == Config().digest()
    assert {*OTHER, "dump"} == Config.model_fields.keys(), "a new option needs a value in OTHER, or a reason to be here"


def test_the_digest_is_the_same_in_any_order() -> None:
    assert (
        Config.load({"regions": "aten", "limit": 1}).digest() == Config.load({"limit": 1, "regions": "aten"}).digest()
    )


def test_the_backend_reports_a_misspelt_option() -> None:
    torch.compiler.reset()
    compiled = torch.compile(nn.Linear(2, 2), backend="dscompile", options={"donat": True})
    with pytest.raises(Exception, match="Did you mean 'donate'"):
        compiled(torch.randn(1, 2))
