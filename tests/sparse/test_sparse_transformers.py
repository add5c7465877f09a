"""The ``sparse_attention`` pass on transformers' own models: the masks they build are understood."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dscompile.report import REPORTS
from tests.sparse.test_sparse_pass import compiled, masked_by_hand, step

transformers = pytest.importorskip("transformers")

SECTION = {"mode": "bigbird", "num_random_blocks": 1}
SEQ = 72
IDS = torch.randint(0, 32, (2, SEQ), generator=torch.Generator().manual_seed(0))
KEPT = torch.ones(2, SEQ, dtype=torch.long)
KEPT[0, 50:] = 0
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Tensor) -> Tensor:
        return self.loss(self.model, *args)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def hidden(model: nn.Module, ids: Tensor, kept: Tensor | None = None) -> Tensor:
    states = model(ids, attention_mask=kept).last_hidden_state
    return (states if kept is None else states * kept.unsqueeze(-1)).square().mean()


def causal(model: nn.Module, ids: Tensor, kept: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=kept, labels=ids, use_cache=False).loss


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "bert": (bert, hidden, (IDS,), 2),
    "bert, padding": (bert, hidden, (IDS, KEPT), 2),
    "llama": (llama, causal, (IDS,), 1),
    "llama, padding": (llama, causal, (IDS, KEPT), 1),
    "vit": (vit, lambda model, x: model(x).last_hidden_state.square().mean(), (PIXELS,), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_model_masked_by_hand(name: str) -> None:
    make, loss, args, layers = CASES[name]
    torch.manual_seed(0)
    model = Wrapped(make(), loss)
    found = step(compiled(model, SECTION), model, args)
    report = REPORTS.all()[0]
    assert (report.verdict, report.fallbacks) == ("approximate", [])
    sites = [p for p in report.passes if p["call"] == "sparse_attention"]
    assert sites[0]["decisions"] == layers
    with masked_by_hand(SECTION):
        expected = step(model, model, args)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
