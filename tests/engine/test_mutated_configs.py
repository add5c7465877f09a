"""A hundred damaged configurations: each is a named error, in seconds, on every rank and before anything is done."""

from __future__ import annotations

import copy
import json
import random
import time
from typing import Any

import pytest
from torch import nn

import dscompile
from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.key_check import KEYS
from dscompile.engine.keys import ANY, LIST, TABLE, UNSET, State
from dscompile.errors import ConfigError, DscompileError, UnsupportedError
from tests.ranks import run_ranks

SOUND: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "gradient_clipping": 1.0,
    "communication_data_type": "fp32",
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "activation_checkpointing": {"partition_activations": False, "profile": False},
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "csv_monitor": {"enabled": False, "output_path": "logs"},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "checkpoint": {"tag_validation": "Warn"},
}


def places(table: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key, sections included."""
    found = []
    for key, value in table.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


def misspelt(word: str, rng: random.Random) -> str:
    index = rng.randrange(1, len(word))
    return rng.choice((word[:index] + word[index + 1 :], word[:index] + "x" + word[index:], word + "_"))


def of_another_type(path: str, rng: random.Random) -> Any:
    kind = KEYS[path].kind if path in KEYS else TABLE
    wrong: list[Any] = [[], "sixteen", -7.5, {"a": 1}]
    if kind in (LIST, TABLE):
        wrong = ["sixteen", 3, True]
    return rng.choice([value for value in wrong if _is_wrong(kind, value)])


def _is_wrong(kind: Any, value: Any) -> bool:
    try:
        kind.read(value)
    except ValueError:
        return True
    return False


def mutate(seed: int) -> tuple[Any, str]:
    """A damaged configuration, as JSON text or a mapping, and a word that its error must have."""
    rng = random.Random(seed)
    config = copy.deepcopy(SOUND)
    how = seed % 6
    if how == 0:  # a misspelt key
        *sections, key = rng.choice([p for p in places(SOUND) if p[0] not in ("optimizer", "scheduler") or len(p) == 1])
        table = config
        for section in sections:
            table = table[section]
        wrong = misspelt(key, rng)
        table[wrong] = table.pop(key)
        return config, wrong
    if how == 1:  # a value of another type
        known = [p for p in places(SOUND) if ".".join(p) in KEYS and KEYS[".".join(p)].kind is not ANY]
        *sections, key = rng.choice(known)
        table = config
        for section in sections:
            table = table[section]
        table[key] = of_another_type(".".join([*sections, key]), rng)
        return config, key
    if how == 2:  # a refused key
        refused = [
            k
            for k in KEYS.values()
            if k.state is State.REFUSED
            and k.default is not UNSET
            and not _has_gate(k.path)
            and k.path != "amp.opt_level"
        ]
        key = rng.choice(refused)
        *sections, name = key.path.split(".")
        table = config
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = key.example
        return config, key.path
    if how == 3:  # sizes that do not multiply, precisions that exclude each other
        damage: list[tuple[dict[str, Any], str]] = [
            ({"train_batch_size": 17 + seed}, "train_batch_size"),
            ({"train_micro_batch_size_per_gpu": 5}, "train_batch_size"),
            ({"gradient_accumulation_steps": 3}, "train_batch_size"),
            ({"train_batch_size": 0}, "train_batch_size"),
            ({"fp16": {"enabled": True}}, "fp16"),
            ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ]
        change, word = damage[(seed // 6) % len(damage)]
        return {**config, **change}, word
    if how == 4:  # optimizers and schedules that do not exist, or not with these arguments
        damage = [
            ({"optimizer": {"type": "Adaam"}}, "Adaam"),
            ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, "learning_rate"),
            ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1}}}, "OneBitAdam"),
            ({"scheduler": {"type": "WarmUpp"}}, "WarmUpp"),
            ({"scheduler": {"type": "WarmupLR", "params": {"steps": 1}}}, "steps"),
            ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, "auto"),
        ]
        change, word = damage[(seed // 6) % len(damage)]
        return {**config, **change}, word
    text = json.dumps(config)  # text that breaks off
    return text[: rng.randrange(1, len(text) - 1)], "config"


def _has_gate(path: str) -> bool:
    """Whether the key means nothing while its section is off."""
    section = path.rpartition(".")[0]
    off = f"{section}.enabled" in KEYS and not path.endswith(".enabled")
    return off or path.endswith(".different_groups") or section.startswith("tensor_parallel") or ".offload_" in section


def outcome(rank: int, world: int, seeds: list[int]) -> list[tuple[int, str, str, float]]:
    """(seed, error's class, its text, seconds) of each."""
    found = []
    for seed in seeds:
        config, _ = mutate(seed)
        start = time.perf_counter()
        try:
            dscompile.initialize(model=nn.Linear(2, 2), config=config)
            found.append((seed, "none", "", time.perf_counter() - start))
        except DscompileError as error:
            found.append((seed, type(error).__name__, str(error), time.perf_counter() - start))
    return found


def check(seeds: list[int]) -> None:
    results = run_ranks(outcome, 2, seeds, timeout=500)
    for first, second in zip(*results, strict=True):
        seed, kind, text, seconds = first
        word = mutate(seed)[1]
        assert kind in (ConfigError.__name__, UnsupportedError.__name__), f"{seed}: {first}"
        assert word in text, f"{seed}: {word} not in {text}"
        assert first[:3] == second[:3]
        assert max(seconds, second[3]) < 5
        assert "\n" not in text


def test_the_sound_one_loads() -> None:
    assert EngineConfig.load(SOUND, world=2).batch.train == 16


def test_fifteen_damaged_configurations() -> None:
    check(list(range(15)))


@pytest.mark.slow
def test_a_hundred_damaged_configurations() -> None:
    check(list(range(100)))
