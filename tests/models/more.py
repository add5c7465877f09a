"""More architectures than the base matrix asks for: other attention, norms, convolutions, recurrences, encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo import Built, _small, _tokens


def _causal(name: str, **extra: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        ids = _tokens()
        config = getattr(transformers, f"{name}Config")(**_small(**extra), use_cache=False)
        return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": ids, "labels": ids}

    return build


def _masked(name: str, **extra: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        ids = _tokens()
        config = getattr(transformers, f"{name}Config")(**{**_small(), **extra})
        return getattr(transformers, f"{name}ForMaskedLM")(config), {"input_ids": ids, "labels": ids}

    return build


def _images(name: str, **extra: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        config = getattr(transformers, f"{name}Config")(**extra)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model = getattr(transformers, f"{name}ForImageClassification")(config)
        return model, {"pixel_values": pixels, "labels": torch.tensor([0, 1])}

    return build


def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return WhisperForConditionalGeneration(config), {"input_features": sound, "labels": _tokens(seq=6)}


def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    side = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**side, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**side, "image_size": 16, "patch_size": 4}, projection_dim=16)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = _tokens()
    return CLIPModel(config), {
        "input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), "return_loss": True,
    }  # fmt: skip


def wav2vec2() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=[16, 16], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
        ctc_zero_infinity=True,
    )  # fmt: skip
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    return Wav2Vec2ForCTC(config), {"input_values": sound, "labels": torch.randint(1, 12, (2, 5))}


MORE: dict[str, Callable[[], Built]] = {
    "qwen2": _causal("Qwen2", num_key_value_heads=2),
    "gemma": _causal("Gemma", num_key_value_heads=2, head_dim=8),
    "phi": _causal("Phi"),
    "opt": _causal("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.1),
    "gpt_neox": _causal("GPTNeoX"),
    "falcon": _causal("Falcon"),
    "bloom": _causal("Bloom", n_layer=2, n_head=4),
    "mamba": _causal("Mamba", state_size=4),
    "olmo": _causal("Olmo", num_key_value_heads=2),
    "qwen2_moe": _causal("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                         shared_expert_intermediate_size=16, num_key_value_heads=2),
    "roberta": _masked("Roberta", max_position_embeddings=40),
    "distilbert": _masked("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "electra": _masked("Electra", embedding_size=16),
    "albert": _masked("Albert", embedding_size=16, num_hidden_groups=1),
    "deberta_v2": _masked("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": _masked("ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "convnext": _images("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "swin": _images("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "mobilenet_v2": _images("MobileNetV2", image_size=32, depth_multiplier=0.35),
    "segformer": _images("Segformer", num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], sr_ratios=[2, 1],
                         num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2]),
    "whisper": whisper,
    "clip": clip,
    "wav2vec2": wav2vec2,
}  # fmt: skip
