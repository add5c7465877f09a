"""The ``sparse_attention`` pass: text before and after, numbers against a hand-masked model, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dscompile
from dscompile.attention_ops import no_kernel
from dscompile.config import Config
from dscompile.errors import ConfigError, PipelineError, VerifyError
from dscompile.graph import GraphKind, StepGraph
from dscompile.manager import REGISTRY, Decision, Numerics, PassContext, PassRecord, parse_pipeline, run_pipeline
from dscompile.report import REPORTS
from dscompile.sparse_section import from_config
from dscompile.text import print_graph
from dscompile.text_diff import diff_text
from dscompile.text_parse import parse_graph
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import temporary_pass, trace

GRAPHS = Path(__file__).parent.parent / "graphs"
BIGBIRD = {"mode": "bigbird", "block": 16, "num_random_blocks": 1}
LOCAL = {"mode": "local_sliding_window", "attention": "bidirectional"}
EACH_HEAD = {
    "mode": "fixed",
    "num_local_blocks": 2,
    "different_layout_per_head": True,
    "num_different_global_patterns": 2,
}


def plan(graph: StepGraph, section: dict[str, Any]) -> tuple[list[PassRecord], list[Decision]]:
    ctx = PassContext(Config.load({"sparse_attention": section}))
    records = run_pipeline(graph, parse_pipeline("canonicalise,sparse_attention,merge_ties"), ctx)
    return records, [d for d in ctx.decisions if d.pass_name == "sparse_attention"]


# -- models ------------------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """A class token and 6 x 6 patches: 37 tokens, a last block of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.layers(torch.cat([self.token.expand(len(x), 1, 16), x], 1)).square().mean()


class Audio(nn.Module):
    """Frames of a waveform, some of them padding."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, 16, 4, stride=4)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )

    def forward(self, wave: Tensor, padding: Tensor) -> Tensor:
        x = self.frames(wave.unsqueeze(1)).transpose(1, 2)
        y = self.layers(x, src_key_padding_mask=padding)
        return (y * ~padding.unsqueeze(-1)).square().mean()


class SequenceFirst(nn.Module):
    """``[seq, batch, width]``, as PyTorch's own layers have it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].square().mean()


class Attention(nn.Module):
    """One attention with whatever the test wants around its scores."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.heads, self.attend = heads, attend

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, 16 // self.heads).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, *masks).transpose(1, 2).reshape(batch, seq, 16).square().mean()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def gpt() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab=32, layers=2, width=16, heads=2, context=128))


def ids(seq: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 32, (2, seq), generator=generator), torch.randint(0, 32, (2, seq), generator=generator)


def tail(batch: int, seq: int, hidden: int) -> Tensor:
    padding = torch.zeros(batch, seq, dtype=torch.bool)
    padding[0, -hidden:] = True
    return padding


# -- the model that is meant: every attention masked by hand -----------------------------------------------------------


@contextmanager
def masked_by_hand(section: dict[str, Any]) -> Iterator[None]:
    """Eager attention in which a key is seen if the model's mask and the layout let it; a lonely query gets 0."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        seq = q.shape[-2]
        layout = from_config(section, q.shape[1])
        blocks = layout.make_layout(-(-seq // layout.block) * layout.block).bool()
        seen = blocks.repeat_interleave(layout.block, 1).repeat_interleave(layout.block, 2)[:, :seq, :seq]
        if is_causal:
            seen = seen & torch.ones(seq, seq, dtype=torch.bool).tril()
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            seen = seen & (attn_mask if attn_mask.dtype is torch.bool else attn_mask > -1e4)
        lonely = ~seen.any(-1, keepdim=True)
        shares = torch.softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(lonely, 0.0)
        return torch.dropout(shares, dropout_p, True) @ v

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def step(run: Callable[..., Tensor], model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    loss = run(*args)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    return [loss.detach(), *grads]


def compiled(
    model: nn.Module, section: dict[str, Any], *, dynamic: bool | None = None, **options: Any
) -> Callable[..., Tensor]:
    torch.compiler.reset()
    REPORTS.clear()
    chosen = {"sparse_attention": section, "regions": "aten", "cache": False, "summary": False, **options}
    return torch.compile(model, backend="dscompile", fullgraph=True, dynamic=dynamic, options=chosen)


WAVE = torch.randn(3, 480, generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "text": (gpt, ids(), BIGBIRD),
    "text, ragged": (gpt, ids(107), {"mode": "fixed"}),
    "text, a layout a head": (gpt, ids(), EACH_HEAD),
    "image patches": (Images, (torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)),), LOCAL),
    "audio frames": (Audio, (WAVE, tail(3, 120, 50)), {"mode": "bslongformer", "global_block_indices": [2]}),
    "audio frames, some alone": (Audio, (WAVE, tail(3, 120, 50)), LOCAL),
    "one sequence, its length first": (SequenceFirst, (torch.randn(70, 1, 16),), LOCAL),
    "sequences, their length first": (SequenceFirst, (torch.randn(70, 2, 16),), LOCAL),
    "bool mask": (lambda: Attention(sdpa), (torch.randn(2, 64, 16), ~tail(2, 64, 9)[:, None, None]), LOCAL),
    "one mask for all": (lambda: Attention(sdpa), (torch.randn(2, 64, 16), ~tail(1, 64, 9)), LOCAL),
    "scale": (lambda: Attention(lambda q, k, v: sdpa(q, k, v, scale=0.3)), (torch.randn(2, 64, 16),), LOCAL),
    "causal mask": (
        lambda: Attention(lambda q, k, v: sdpa(q, k, v, torch.ones(64, 64, dtype=torch.bool).tril())),
        (torch.randn(2, 64, 16),),
        LOCAL,
    ),
    "added causal mask": (
        lambda: Attention(lambda q, k, v: sdpa(q, k, v, torch.full((64, 64), -torch.inf).triu(1))),
        (torch.randn(2, 64, 16),),
        LOCAL,
    ),
    "causal and padding": (
        lambda: Attention(lambda q, k, v, m: sdpa(q, k, v, m & torch.ones(64, 64, dtype=torch.bool).tril())),
        (torch.randn(2, 64, 16), ~tail(2, 64, 9)[:, None, None]),
        BIGBIRD,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_model_masked_by_hand(name: str) -> None:
    make, args, section = CASES[name]
    torch.manual_seed(0)
    model = make()
    found = step(compiled(model, section), model, args)
    report = REPORTS.all()[0]
    assert report.verdict == "approximate"
    assert not report.fallbacks
    with masked_by_hand(section):
        expected = step(model, model, args)
    dense = step(model, model, args)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(expected, dense, strict=True)), "the layout hides nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_16_bit_model_is_rewritten(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Attention(lambda q, k, v, m: sdpa(q, k, v, m)).to(dtype)
    args = (torch.randn(2, 90, 16).to(dtype), ~tail(2, 90, 9)[:, None, None])
    found = step(compiled(model, LOCAL), model, args)
    reports = REPORTS.all()
    assert [(r.verdict, r.fallbacks) for r in reports] == [("approximate", [])] * 2
    assert no_kernel(dtype) == ""
    with masked_by_hand(LOCAL):
        expected = step(model.double(), model, (args[0].double(), args[1]))
    for got, want in zip(found, expected, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 16 * torch.finfo(dtype).eps, "a few roundings of activations, weights and gradients"


def test_inference_too() -> None:
    model = gpt().requires_grad_(False)
    with torch.no_grad():
        found = compiled(model, BIGBIRD)(*ids())
        with masked_by_hand(BIGBIRD):
            torch.testing.assert_close(found, model(*ids()), atol=1e-5, rtol=1e-4)
    assert REPORTS.all()[0].kind == GraphKind.INFERENCE


def test_a_dense_layout_changes_nothing() -> None:
    model = gpt()
    found = step(compiled(model, {"mode": "dense"}), model, ids())
    for got, want in zip(found, step(model, model, ids()), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_the_step_entry_rewrites_too() -> None:
    model = gpt()
    options = {"sparse_attention": BIGBIRD, "regions": "aten", "cache": False, "summary": False}
    run = dscompile.compile_step(model, lambda m, x, y: m(x, y), *ids(), config=options)
    loss = run(*ids())
    grads = [p.grad for p in model.parameters()]
    with masked_by_hand(BIGBIRD):
        expected = step(model, model, ids())
    for got, want in zip([loss, *grads], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_cached_program_is_the_sparse_one() -> None:
    model = gpt()
    first = step(compiled(model, BIGBIRD, cache=True), model, ids())
    again = step(compiled(model, BIGBIRD, cache=True), model, ids())
    assert any(report.cached for report in REPORTS.all())
    for got, want in zip(again, first, strict=True):
        assert torch.equal(got, want)
    dense = step(compiled(model, {"mode": "dense"}, cache=True), model, ids())
    assert not torch.equal(dense[1], first[1])


# -- attention written out ---------------------------------------------------------------------------------------------


def test_attention_written_out_is_masked_and_said() -> None:
    torch.manual_seed(0)
    model, x = Attention(written_out), torch.randn(2, 61, 16)
    found = step(compiled(model, BIGBIRD), model, (x,))
    (report, *_) = REPORTS.all()
    assert "%_softmax masked: the model writes attention out" in report.fallbacks[0]
    model.attend = lambda q, k, v: sdpa(q, k, v, is_causal=True)
    with masked_by_hand(BIGBIRD):
        expected = step(model, model, (x,))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_with_dropout_inside_attention() -> None:
    torch.manual_seed(0)
    model = Attention(lambda q, k, v, m: sdpa(q, k, v, m, dropout_p=0.3))
    args = (torch.randn(2, 64, 16), ~tail(2, 64, 30)[:, None, None])
    run = compiled(model, LOCAL)
    torch.manual_seed(5)
    found = step(run, model, args)
    assert "masked" in REPORTS.all()[0].fallbacks[0]
    torch.manual_seed(5)
    with masked_by_hand(LOCAL):
        expected = step(model, model, args)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


# -- text --------------------------------------------------------------------------------------------------------------


def test_before_and_after() -> None:
    graph = parse_graph((GRAPHS / "sparse_attention.txt").read_text())
    records, decisions = plan(graph, LOCAL)
    assert diff_text((GRAPHS / "sparse_attention.after.txt").read_text(), print_graph(graph)) == ""
    assert [(r.name, r.verdict, r.numerics) for r in records[:2]] == [
        ("canonicalise", "proved", "bitwise"),
        ("sparse_attention", "different", "approximate"),
    ]
    assert records[1].apart_from == len([n for n in graph.nodes if "block_sparse" in str(n.target)]) + 1  # one copy
    assert records[2].verdict == "proved", "later passes are proved against the sparse meaning"
    assert [(d.choice, d.facts["density"], d.facts["causal"], d.facts["padding"]) for d in decisions] == [
        ("sparse", 10 / 16, False, 1)
    ]


@pytest.mark.parametrize("when", ["each", "end", "off"])
def test_a_later_pass_is_proved_against_the_sparse_graph(when: str) -> None:
    graph = trace(gpt(), *ids())
    ctx = PassContext(Config.load({"sparse_attention": BIGBIRD, "verify": when}))
    records = run_pipeline(graph, parse_pipeline("canonicalise,sparse_attention,merge_ties"), ctx)
    verdicts = [r.verdict for r in records]
    assert (
        verdicts[1:]
        == {"each": ["different", "proved"], "end": ["different", "proved"], "off": ["unchecked"] * 2}[when]
    )


def test_equal_attention_shares_one_index() -> None:
    graph = trace(gpt(), *ids())
    _, decisions = plan(graph, BIGBIRD)
    assert [d.choice for d in decisions] == ["sparse", "sparse"]
    constants = [n for n in graph.nodes if n.op == "get_attr"]
    assert len(constants) == 4
    assert all(len(n.users) == 4 for n in constants)  # forward and backward of two layers


PLANTED: dict[str, Callable[[fx.Node], None]] = {
    "keys for queries": lambda new: new.update_arg(0, new.args[1]),
    "values for keys": lambda new: new.update_arg(1, new.args[2]),
    "something else besides": lambda new: new.args[2].replace_all_uses_with(
        new.args[1], delete_user_cb=lambda user: user is not new
    ),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("half", ["block_sparse_attention_default", "block_sparse_attention_backward_default"])
def test_a_change_beyond_the_declared_ones_is_an_error(name: str, half: str) -> None:
    def faulty(graph: StepGraph, ctx: PassContext) -> None:
        REGISTRY["sparse_attention"].function(graph, ctx)
        PLANTED[name](next(n for n in graph.nodes if n.name == half))

    graph = trace(gpt(), *ids())
    ctx = PassContext(Config.load({"sparse_attention": BIGBIRD}))
    with temporary_pass(faulty, numerics=Numerics.APPROXIMATE) as planted, pytest.raises(VerifyError):
        run_pipeline(graph, parse_pipeline(f"canonicalise,{planted}"), ctx)


@pytest.mark.parametrize("limit", range(8))
def test_it_stops_after_any_edit(limit: int) -> None:
    graph = trace(gpt(), *ids())
    ctx = PassContext(Config.load({"sparse_attention": BIGBIRD, "limit": limit}))
    run_pipeline(graph, parse_pipeline("canonicalise,sparse_attention"), ctx)


# -- what it refuses ---------------------------------------------------------------------------------------------------

WINDOW = torch.ones(64, 64, dtype=torch.bool).tril().triu(-7)
REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "cross attention": (lambda q, k, v: sdpa(q, k[:, :, :32], v[:, :, :32]), (), "not the attention of a sequence to"),
    "a window": (lambda q, k, v: sdpa(q, k, v, WINDOW.clone()), (), "other keys than those after the query|depends on"),
    "a constant window": (
        lambda q, k, v: sdpa(q, k, v, torch.ones(64, 64, dtype=torch.bool).tril().triu(-7)),
        (),
        "hides other keys than those after the query",
    ),
    "a bias": (
        lambda q, k, v: sdpa(q, k, v, torch.arange(64.0)[None] - torch.arange(64.0)[:, None]), (), "a bias, not a mask"
    ),
    "a bias from an input": (
        lambda q, k, v, m: sdpa(q, k, v, m), (torch.randn(2, 1, 64, 64),), "added to the scores come from an input"
    ),
    "a mask of every pair": (
        lambda q, k, v, m: sdpa(q, k, v, m),
        (torch.ones(2, 1, 64, 64, dtype=torch.bool),),
        "differs from query to query",
    ),
    "numbers as a mask": (
        lambda q, k, v, m: sdpa(q, k, v, torch.logical_and(torch.zeros(64), m)),
        (torch.ones(2, 1, 1, 64, dtype=torch.bool),),
        "no booleans",
    ),
    "head size": (lambda q, k, v: sdpa(q[..., :4], k[..., :4], v[..., :4]).repeat(1, 1, 1, 2), (), "head size 4"),
    "too short": (
        lambda q, k, v: sdpa(q[:, :, :32], k[:, :, :32], v[:, :, :32]).repeat(1, 1, 2, 1), (), "has 2 blocks"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_stays_dense_and_is_reported(name: str) -> None:
    attend, masks, reason = REFUSED[name]
    model, args = Attention(attend), (torch.randn(2, 64, 16), *masks)
    graph = trace(model, *args)
    records, decisions = plan(graph, {"mode": "bigbird"})
    assert [d.choice for d in decisions] == ["refused"]
    assert decisions[0].fallback
    assert re.search(reason, decisions[0].reason), decisions[0].reason
    assert records[1].verdict == "proved"
    found = step(compiled(model, {"mode": "bigbird"}), model, args)
    assert "refused" in REPORTS.all()[0].fallbacks[0]
    for got, want in zip(found, step(model, model, args), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(16, 4), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return (self.gate(x).softmax(-1).sum(-1, keepdim=True) * self.up(x)).square().mean()

    graph = trace(Router(), torch.randn(2, 64, 16))
    assert plan(graph, LOCAL)[1] == []


def test_configuration_errors() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'sparse_attention\.block'"):
        Config.load({"sparse_attention": {"blok": 16}})
    with pytest.raises(ConfigError, match=r"'sparse_attention\.mode'"):
        Config.load({"sparse_attention": {"mode": "sparse"}})
    with pytest.raises(ConfigError, match="horizontal_global_attention needs"):
        Config.load({"sparse_attention": {"attention": "unidirectional", "horizontal_global_attention": True}})
    graph = trace(gpt(), *ids())
    with pytest.raises(ConfigError, match="24 is not one of 16"):
        plan(graph, {"block": 24})
    with pytest.raises(PipelineError, match="needs the option 'sparse_attention'"):
        run_pipeline(graph, parse_pipeline("sparse_attention"), PassContext(Config()))
    with pytest.raises(PipelineError, match="must come after 'canonicalise'"):
        parse_pipeline("sparse_attention,canonicalise")
    with pytest.raises(Exception, match="lacks 'sparse_attention'"):
        compiled(gpt(), LOCAL, pipeline="canonicalise(cse=False)")(*ids())


def test_it_stands_in_every_named_pipeline() -> None:
    from dscompile.passes import PIPELINES, with_sparse_attention

    for name in PIPELINES:
        config = Config.load({"pipeline": name, "sparse_attention": LOCAL})
        calls = [str(call.spec.name) for call in parse_pipeline(with_sparse_attention(name, config))]
        assert calls.count("sparse_attention") == 1
        assert calls[0] in ("canonicalise", "sparse_attention")
    spelt = Config.load({"pipeline": "canonicalise,sparse_attention", "sparse_attention": LOCAL})
    assert with_sparse_attention(spelt.pipeline, spelt) == spelt.pipeline
    assert with_sparse_attention("zero3", Config()) == PIPELINES["zero3"]


ZERO = """
import torch.distributed as dist, dscompile
from tests.sparse.test_sparse_pass import BIGBIRD, gpt, ids, masked_by_hand, step
from dscompile.report import REPORTS
import sys, torch
dist.init_process_group("gloo", rank=0, world_size=1, init_method="file://" + sys.argv[1])
model, plain = gpt(), gpt()
options = {"zero": {"stage": 3}, "sparse_attention": BIGBIRD, "regions": "aten", "cache": False, "summary": False}
dscompile.distribute(model, config=options)
loss = torch.compile(model, backend="dscompile", fullgraph=True)(*ids())
loss.backward()
with masked_by_hand(BIGBIRD):
    expected = step(plain, plain, ids())
for got, want in zip([loss.detach(), *(p.grad.full_tensor() for p in model.parameters())], expected, strict=True):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
calls = [p["call"].partition("(")[0] for p in REPORTS.all()[0].passes]
assert calls.index("sparse_attention") < calls.index("zero3"), calls
dist.destroy_process_group()
"""


def test_it_runs_before_zero_3(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ZERO, str(tmp_path / "store")],
        cwd=GRAPHS.parent.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
