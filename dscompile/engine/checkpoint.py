"""Save and load a training run: model, optimizer, random state and whatever else the script keeps.

::

    handle = save_checkpoint("run", "step_100", model=model, optimizer=optimizer, state={"scheduler": s.state_dict()})
    loaded = load_checkpoint("run", model=model, optimizer=optimizer)       # the newest complete one
    scheduler.load_state_dict(loaded.state["scheduler"])

Shards are written and read through PyTorch's distributed checkpoint (DCP), so any number of ranks and any ZeRO stage
may load what any other saved. Every rank calls both functions; both raise the same error on every rank.
"""

from __future__ import annotations

from dscompile.engine.checkpoint_load import Loaded, load_checkpoint, read_state
from dscompile.engine.checkpoint_save import save_checkpoint
from dscompile.engine.checkpoint_saver import SaveHandle

__all__ = ["Loaded", "SaveHandle", "load_checkpoint", "read_state", "save_checkpoint"]
