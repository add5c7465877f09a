"""A process of its own: the interpreter as Triton ships it."""

from __future__ import annotations

import json
import sys

from tests.kernels import interpret, interpret_attention

if __name__ == "__main__":
    case, _ = sys.argv[1:]
    held = interpret_attention.gpu_for_cpu()
    results = {case: interpret.run(case), "attention": interpret_attention.run("random/bf16/16/32/16/-")}
    sys.stdout.write(json.dumps(results))
