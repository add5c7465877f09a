"""Start a worker process and read the JSON that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def work(module: str, arguments: Sequence[str], *, timeout: float = 1500) -> dict[str, Any]:
    """Run ``python -m tests.kernels.MODULE`` in the checkout.

    ``timeout`` in seconds is that of the slow matrices on a busy machine; other tests are ended by pytest's own.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found
