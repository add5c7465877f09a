"""DeepSpeed's configuration: every key is acted on, accepted with a reason or refused by name; none is ignored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.key_check import KEYS
from dscompile.engine.keys import UNSET, Key, State
from dscompile.errors import ConfigError

BASE = {"train_micro_batch_size_per_gpu": 2}

CONTEXT: dict[str, dict[str, Any]] = {
    "optimizer.params": {"optimizer.type": "Adam"},
    "scheduler.params": {"scheduler.type": "WarmupLR"},
}
"""Keys that mean something only beside another one."""


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return result


def load(flat: dict[str, Any], **options: Any) -> EngineConfig:
    return EngineConfig.load(nested(BASE | flat), **options)


def gates(key: Key) -> dict[str, Any]:
    """What must be switched on for the key to be read at all."""
    enabled = f"{key.section}.enabled"
    return {enabled: True} if enabled in KEYS and enabled != key.path else {}


def effects(config: EngineConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("accepted", "given")}


def with_state(state: State) -> list[Key]:
    return [key for key in KEYS.values() if key.state is state]


@pytest.mark.parametrize("key", with_state(State.ACTED), ids=lambda key: key.path)
def test_a_key_that_is_acted_on_shows_in_what_the_engine_does(key: Key) -> None:
    around = CONTEXT.get(key.path, {}) | gates(key)
    if key.section == "sparse_attention" and key.path != "sparse_attention.mode":
        around |= {"sparse_attention.mode": "variable"}
    if key.path == "data_parallel_size":  # it can only confirm
        with pytest.raises(ConfigError, match="data_parallel_size = 2, but there are 1 ranks"):
            load({key.path: 2})
        return
    if "dtype" in key.path or key.path in ("communication_data_type", "fp16.enabled", "bf16.enabled"):
        pytest.importorskip("dscompile.precision")
    before, after = load(around), load(around | {key.path: key.example})
    assert effects(before) != effects(after), f"{key.path} = {key.example!r} changes nothing"
    assert not [note for note in after.accepted if note.key == key.path]


@pytest.mark.parametrize("key", with_state(State.ACCEPTED), ids=lambda key: key.path)
def test_a_key_that_changes_nothing_is_recorded_with_the_reason(key: Key) -> None:
    around = {path: True for path in gates(key) if KEYS[path].state is State.ACTED}
    before, after = load(around), load(around | {key.path: key.example})
    assert effects(before) == effects(after)
    (note,) = after.accepted
    assert (note.key, note.value) == (key.path, key.example)
    assert len(note.why) > 10


@pytest.mark.parametrize("key", with_state(State.REFUSED), ids=lambda key: key.path)
def test_a_key_that_is_refused_names_itself_and_the_reason(key: Key) -> None:
    gate = next((path for path in gates(key) if KEYS[path].state is State.REFUSED), None)
    switches = {
        "zero_optimization.offload_param": ("zero_optimization.offload_param.device", "nvme"),
        "zero_optimization.offload_optimizer": ("zero_optimization.offload_optimizer.device", "nvme"),
        "tensor_parallel": ("tensor_parallel.autotp_size", 2),
    }
    if key.section in switches and key.path != switches[key.section][0]:
        gate, on = switches[key.section]
    elif key.path.endswith(".different_groups"):
        gate, on = f"{key.section}.shared_parameters.enabled", True
    else:
        on = True
    acted = {path: True for path in gates(key) if KEYS[path].state is State.ACTED}
    named, given = (key, {key.path: key.example}) if gate is None else (KEYS[gate], {key.path: key.example, gate: on})
    given |= acted
    with pytest.raises(ConfigError) as caught:
        load(given, device="cuda")
    message = str(caught.value)
    assert named.path in message
    assert named.why in message
    if gate is not None:  # off, it is as harmless as in DeepSpeed, and still on record
        (note,) = load({key.path: key.example}).accepted
        assert note.key == key.path
        assert gate in note.why


def test_every_default_is_taken_and_leaves_no_note() -> None:
    given = {key.path: key.default for key in KEYS.values() if key.default is not UNSET}
    config = EngineConfig.load(nested(given | BASE))
    assert config.accepted == ()
    plain = load({})
    assert dataclasses.replace(config, given={}, compiler=plain.compiler) == dataclasses.replace(plain, given={})


DOCUMENTED = Path(__file__).with_name("documented_keys.txt").read_text().splitlines()
"""The keys of DeepSpeed's page (docs/_pages/config-json.md, 0.19.8), written down by hand from its tables."""


def test_no_documented_key_is_missing_from_the_table() -> None:
    assert [path for path in DOCUMENTED if path not in KEYS] == []
    assert len(DOCUMENTED) > 180


def test_the_reasons_say_something() -> None:
    assert [key.path for key in KEYS.values() if len(key.why) < 15] == []


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_a_file_a_mapping_and_a_text_are_one_configuration(tmp_path: Path) -> None:
    given = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e6}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(given))
    loaded = [EngineConfig.load(source) for source in (given, path, str(path), json.dumps(given))]
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3]
    assert loaded[0].compiler.zero.stage == 2
    assert loaded[0].compiler.zero.reduce_bucket_size == 2_000_000
    assert given == {"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e6}}


def test_a_file_of_hugging_face_s_documentation_loads() -> None:
    """Shape of the ZeRO-3 example: offload to the CPU, where training runs, and sizes left to the trainer."""
    config = EngineConfig.load(
        {
            "bf16": {"enabled": False},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "offload_param": {"device": "cpu", "pin_memory": True},
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "steps_per_print": 2000,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 4,
            "wall_clock_breakdown": False,
        },
        world=2,
    )
    assert config.batch.train == 8
    assert config.compiler.zero.stage == 3
    assert config.compiler.zero.reduce_bucket_size == 8_000_000
    assert {note.key for note in config.accepted} == {
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_param.device",
    }


def test_zero_as_a_boolean_is_stage_1() -> None:
    assert load({"zero_optimization": True}).compiler.zero.stage == 1
    assert load({"zero_optimization": False}).compiler.zero.stage == 0


def test_our_own_section_reaches_the_compiler() -> None:
    config = load({"dscompile": {"verify": "end", "zero": {"keep_elements": 5}}, "zero_optimization.stage": 3})
    assert config.compiler.verify == "end"
    assert (config.compiler.zero.stage, config.compiler.zero.keep_elements) == (3, 5)
    with pytest.raises(ConfigError, match=r"dscompile\.zero\.stage = 1 differs"):
        load({"dscompile": {"zero": {"stage": 1}}, "zero_optimization.stage": 3})
    with pytest.raises(ConfigError, match=r"unknown option 'verfy'\. Did you mean 'verify'"):
        load({"dscompile": {"verfy": "end"}})


def test_sparse_attention_reaches_the_compiler() -> None:
    section = {"mode": "bigbird", "block": 32, "num_sliding_window_blocks": 5, "local_window_blocks": [4]}
    found = load({"sparse_attention": section}).compiler.sparse_attention
    assert found is not None
    assert (found.mode, found.block, found.num_sliding_window_blocks) == ("bigbird", 32, 5)
    assert load({}).compiler.sparse_attention is None
    with pytest.raises(ConfigError, match="sparse_attention"):
        load({"sparse_attention": {"mode": "fixed", "num_local_blocks": 3, "num_global_blocks": 2}})


# -- batch sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((24, 3, 4), (24, 3, 4)),
        ((24, 3, None), (24, 3, 4)),
        ((24, None, 4), (24, 3, 4)),
        ((None, 3, 4), (24, 3, 4)),
        ((24, None, None), (24, 12, 1)),
        ((None, 3, None), (6, 3, 1)),
    ],
)
def test_two_batch_sizes_give_the_third(given: tuple[int | None, ...], expected: tuple[int, int, int]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    batch = EngineConfig.load(values, world=2).batch
    assert (batch.train, batch.micro, batch.accumulation) == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "give train_batch_size or train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 2}, "give train_batch_size or train_micro_batch_size_per_gpu"),
        (
            {"train_batch_size": 25, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4},
            r"3 \* 4 \* 2 = 24",
        ),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, "no multiple of train_micro_batch_size_per_gpu"),
        ({"train_batch_size": 10, "gradient_accumulation_steps": 3}, "no multiple of gradient_accumulation_steps"),
        ({"train_batch_size": 9}, "no multiple"),
    ],
)
def test_batch_sizes_that_do_not_multiply(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig.load(values, world=2)


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"fp16.enabled": True, "bf16.enabled": True}, r"fp16\.enabled and bf16\.enabled exclude each other"),
        ({"fp16.enabled": True, "torch_autocast.enabled": True}, r"fp16\.enabled and torch_autocast\.enabled exclude"),
        ({"zero_optimisation.stage": 1}, "unknown key 'zero_optimisation'. Did you mean 'zero_optimization'"),
        ({"zero_optimization.satge": 1}, "unknown key 'satge' in section 'zero_optimization'. Did you mean 'stage'"),
        ({"zero_optimization.stage": 4}, r"zero_optimization\.stage = 4: must be at most 3"),
        ({"zero_optimization.stage": "2"}, r"zero_optimization\.stage = '2': expected a finite number"),
        ({"zero_optimization": 2}, "zero_optimization: expected an object"),
        ({"fp16.enabled": "true"}, r"fp16\.enabled = 'true': expected true or false"),
        ({"fp16.enabled": "auto"}, "Hugging Face's Trainer fills it in"),
        ({"optimizer.type": "Adam", "optimizer.params": {"lr": "auto"}}, r"optimizer\.params\.lr = 'auto'"),
        ({"optimizer.params": {"lr": 1}}, r"optimizer\.params without optimizer\.type"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1: must be at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping = nan: expected a finite number"),
        ({"communication_data_type": "int8"}, "expected fp32, fp16 or bf16"),
        ({"bf16.enabled": False, "bfloat16": {"enabled": True}}, "bf16 is given under two names, also bfloat16"),
        ({"torch_autocast.enabled": True, "torch_autocast.dtype": "fp32"}, "expected bf16 or fp16"),
    ],
)
def test_a_mistake_is_named(flat: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(flat)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"train_batch_size": 8,}', "config:1:24: not valid JSON"),
        ('{"train_batch_size": 8, "train_batch_size": 8}', "key 'train_batch_size' stands twice"),
        ("no/such/file.json", "no/such/file.json: cannot read the configuration"),
        ('{"a":' * 100_000, "not valid JSON|nested too deeply"),
    ],
    ids=["comma", "twice", "file", "deep"],
)
def test_a_text_that_is_no_configuration(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig.load(text)


def test_offload_is_refused_where_it_would_do_something() -> None:
    with pytest.raises(ConfigError, match=r"offload_param\.device = 'cpu' is refused: there is no offload"):
        load({"zero_optimization.offload_param.device": "cpu"}, device="cuda")
