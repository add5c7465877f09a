"""The source of generated kernels, word for word: a change of the generator shows as a diff of what it writes.

To accept new source: ``python -m tests.kernels.test_source`` writes the files anew; read the diff before committing it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.library import entries, example, generate
from dscompile.codegen.triton_backend.templates.attention import Attention, attention_kernels
from dscompile.codegen.triton_backend.templates.evoformer import Evoformer, evoformer_kernels

GOLDEN = Path(__file__).parent / "golden"
NAMES = (
    "bias_gelu", "layer_norm", "layer_norm_backward", "softmax_long", "cross_entropy_both", "rotary", "adamw", "lamb",
    "unscale", "attention", "embedding_norm", "cumulative_softmax", "embedding_backward", "batch_norm",
    "max_pool_backward", "evoformer", "pad_join", "index_add",
)  # fmt: skip


def kernels(name: str) -> list[Kernel]:
    if name == "attention":
        use = Attention(64, 64, torch.bfloat16, 0.125, (512,) * 4, causal=True)
        return list(attention_kernels(use).values())
    if name == "evoformer":
        bf16 = torch.bfloat16
        return list(evoformer_kernels(Evoformer(32, bf16, 0.125, (128,) * 4, (32,) * 4, bf16, bf16, True)).values())
    rows, cols = (64, 20000) if name == "softmax_long" else (64, 768)
    name = name.removesuffix("_long")
    return list(generate(name, example(name, torch.bfloat16, rows, cols)).kernels)


def text(name: str) -> str:
    return "\n\n".join(k.source for k in kernels(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_source_is_the_golden_one(name: str) -> None:
    assert text(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", [*entries(), "attention", "evoformer"])
def test_the_source_stands_alone_and_uses_triton_language_only(name: str) -> None:
    """No libdevice and no inline assembly, which Triton's interpreter does not have; imports of triton alone."""
    for kernel in kernels(name):
        tree = ast.parse(kernel.source)
        imported = {
            a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names
        }
        assert imported == {"triton", "triton.language"}
        assert "libdevice" not in kernel.source
        assert "inline_asm" not in kernel.source
        assert "tl.math" not in kernel.source
        header = ast.get_docstring(tree)
        assert header is not None
        assert header.startswith(f"{kernel.name}:")
        assert "moves:" in header
        assert max(map(len, kernel.source.splitlines())) <= 130


@pytest.mark.parametrize("name", ["attention", "evoformer"])
def test_products_say_their_precision(name: str) -> None:
    """Triton's default for fp32 is tf32, silently."""
    for kernel in kernels(name):
        assert kernel.source.count("tl.dot(") == kernel.source.count("input_precision=PRECISION") > 0
        assert kernel.constants["PRECISION"] == "ieee"


if __name__ == "__main__":
    for each in NAMES:
        (GOLDEN / f"{each}.txt").write_text(text(each))
