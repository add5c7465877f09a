"""BERT's masked language model, unchanged: the loss is fused, and only the masked tokens are projected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForMaskedLM

from dscompile.config import Config
from dscompile.manager import PassContext, parse_pipeline, run_pipeline
from tests.build import trace

CLASSES, WIDTH, BATCH, SEQ = 512, 32, 2, 32


def model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=CLASSES,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=SEQ,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def batch() -> tuple[Tensor, Tensor]:
    """Ids, and labels at one token of eight."""
    ids = torch.randint(CLASSES, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, ::8] = ids[:, ::8]
    return ids, labels


def test_the_loss_is_fused() -> None:
    bert = model()
    graph = trace(lambda ids, labels: bert(input_ids=ids, labels=labels).loss, *batch())
    context = PassContext(Config.load({"fused_loss": "on"}))
    run_pipeline(graph, parse_pipeline("canonicalise,fuse_loss"), context)
    assert [d.choice for d in context.decisions if d.pass_name == "fuse_loss"] == ["fused"]


def test_loss_gradients_and_the_rows_projected() -> None:
    plain, bert = model(), model()
    ids, labels = batch()
    wanted = plain(input_ids=ids, labels=labels).loss
    wanted.backward()
    torch.compiler.reset()

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = bert(input_ids=ids, labels=labels).loss
        return loss

    step = torch.compile(loss_of, backend="dscompile", options={"summary": False, "fused_loss": "on"})
    step(ids, labels).backward()
    bert.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        loss = step(ids, labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(bert.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    products = [e.input_shapes for e in prof.events() if e.name in ("aten::mm", "aten::addmm")]
    projected = [shapes for shapes in products if any(CLASSES in shape for shape in shapes)]
    assert projected
    assert not any(BATCH * SEQ in shape for shapes in projected for shape in shapes)
    assert any(BATCH * SEQ // 8 in shape for shapes in projected for shape in shapes)
