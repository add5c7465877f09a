"""What users of other systems met in training, by thread: each must not happen here. ``docs/threads.md`` lists all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import dscompile
from dscompile.comm import ours
from dscompile.graph import InputKind
from dscompile.text import print_graph
from tests.distributed.planned import fake_world, plan, plan_distributed


class Blocks(nn.Module):
    """Three layers whose parameters are used in another order than they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.middle = nn.Linear(6, 5), nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class RealTensors(TorchDispatchMode):
    """Counts results that are neither fake nor small."""

    def __init__(self, larger_than: int) -> None:
        super().__init__()
        self.larger_than = larger_than
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and result.device.type != "meta" and result.numel() > self.larger_than:
            self.found.append(f"{func}: {tuple(result.shape)}")
        return result


def test_nothing_is_computed_to_make_a_plan() -> None:
    """DeepSpeed#7770: out of memory while a profiler ran cross-entropy, decomposed, node by node."""
    rows, vocabulary, watched = 64, 4096, RealTensors(larger_than=64 * 1024)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        with watched:
            return dscompile.backend.dscompile(gm, inputs, options={"regions": "aten", "cache": False})

    head = nn.Linear(4, vocabulary, bias=False)  # 16 Ki elements, its logits 256 Ki
    x, labels = torch.randn(rows, 4), torch.randint(vocabulary, (rows,))
    loss = torch.compile(lambda: nn.functional.cross_entropy(head(x), labels), backend=backend)()
    assert watched.found == []
    with watched:
        loss.backward()
    assert watched.found != []  # the step itself does make them


def test_steps_of_any_size_with_backward_or_without() -> None:
    """DeepSpeed#7611 and PR#7980: hangs and a new backward graph a step; the two were taken for pairs."""
    torch.manual_seed(0)
    model = Blocks()
    counter = torch._dynamo.testing.CompileCounterWithBackend("dscompile")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for step, rows in enumerate((5, 3, 8, 2, 6, 4, 7, 9)):
        x = torch.randn(rows, 4)
        model.zero_grad()
        if step % 3 == 0:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))
            continue
        loss = compiled(x).square().sum()
        if step % 3 == 1:
            continue  # skipped
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad)
    assert counter.frame_count <= 2  # with gradients and without


def test_a_buckets_payload_is_in_one_order_whatever_the_schedule() -> None:
    """torchtitan#3590: the order in a bucket changed bf16 sums on many nodes.

    Here it is that of the graph's inputs, which is the order of first use, also where backward makes gradients the
    other way round.
    """
    with fake_world(4):
        model = Blocks()
        found = plan(model, torch.randn(2, 4), stage=3, stage3_param_persistence_threshold=0)
    params = dict(model.named_parameters())
    shapes = {i.name: params[i.fqn].shape for i in found.joint.inputs if i.kind is InputKind.PARAMETER}
    order = list(shapes.values())
    assert len(set(order)) == len(params)  # so a shape names its parameter
    longest = {}
    for node in found.joint.nodes:
        if node.target in (ours.pack_shards.default, ours.pack_grads.default):
            payload = [shapes.get(n.name, n.meta["val"].shape) for n in node.args[0]]
            assert payload == sorted(payload, key=order.index)
            longest[node.target] = max(len(payload), longest.get(node.target, 0))
    assert min(longest.values()) > 1
    assert len(longest) == 2


def test_no_groups_name_is_in_a_graph() -> None:
    """pytorch#189330: a process group's name in the graph made every start miss the cache."""
    texts = []
    for groups_before in (0, 3):
        with fake_world(4):
            for _ in range(groups_before):
                dist.new_group([0, 1, 2, 3])
            mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
            torch.manual_seed(0)
            model = dscompile.distribute(Blocks(), mesh, config={"zero": {"stage": 3}})
            texts.append(print_graph(plan_distributed(model, torch.randn(2, 4)).joint))
    assert texts[0] == texts[1]
    assert '"dp"' in texts[0]
