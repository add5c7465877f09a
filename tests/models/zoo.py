"""The ``transformers`` models of the base matrix: tiny configurations with random weights, built offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]


def _tokens(vocab: int = 64, batch: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(0))


def _small(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        **extra,
    }


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = _tokens()
    config = LlamaConfig(**_small(num_key_value_heads=2), use_cache=False)
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def mistral() -> Built:
    from transformers import MistralConfig, MistralForCausalLM

    ids = _tokens()
    config = MistralConfig(**_small(num_key_value_heads=2, sliding_window=8), use_cache=False)
    return MistralForCausalLM(config), {"input_ids": ids, "labels": ids}


def mixtral() -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = _tokens()
    config = MixtralConfig(**_small(num_key_value_heads=2), num_local_experts=4, use_cache=False)
    return MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = _tokens()
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    return BertForMaskedLM(BertConfig(**_small())), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    ids = _tokens()
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, use_cache=False, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": _tokens(seq=6)}


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ResNetForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 0])}


ZOO: dict[str, Callable[[], Built]] = {f.__name__: f for f in (llama, gpt2, mistral, mixtral, bert, t5, vit, resnet)}
