"""The passes, one family a file, and the pipelines that string them together.

A pipeline is one readable line. Order matters and is checked against each pass's contract when the line is parsed.
"""

from __future__ import annotations

from dscompile.passes import canonicalise as _canonicalise  # noqa: F401  (registers itself)

PIPELINES: dict[str, str] = {
    "default": "canonicalise",
    "none": "",
}
"""Named pipelines. ``default`` is what ``torch.compile(model, backend="dscompile")`` runs."""
