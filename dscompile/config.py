"""The configuration: one frozen object, and the whole of it is the cache key (but where dumps go).

It is built from a dict, a JSON file or ``torch.compile(options=...)``. Unknown keys are errors that name the nearest
valid key, so that a misspelt option never silently does nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dscompile.errors import ConfigError, nearest

Choice = Literal["auto", "on", "off"]


class Config(BaseModel):
    """Options of one compilation. Every field is an option of the same name in JSON and in ``options=``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pipeline: str = Field("default", description="A named pipeline or a pipeline string, e.g. 'canonicalise'.")
    verify: Literal["each", "end", "off"] = Field(
        "each", description="Run the verifier and the equivalence proof after each pass, once at the end, or never."
    )
    limit: int | None = Field(None, ge=0, description="Stop editing after this many numbered edits (for bisecting).")
    dump: str | None = Field(
        None,
        description="Directory that receives the run's artifact: manifest, text, tables. Every start traces again.",
        json_schema_extra={"output_only": True},
    )

    regions: Literal["auto", "whole", "aten"] = Field(
        "auto",
        description="'auto' cuts at repeated blocks and compiles equal regions once; 'whole' compiles each graph as "
        "one region; 'aten' runs every node with PyTorch's own kernels (the reference executor).",
    )
    donate: bool = Field(True, description="Let a region overwrite inputs that nothing reads afterwards.")
    rng: Literal["eager", "fused"] = Field(
        "eager", description="'eager' draws exactly the random numbers of eager mode; 'fused' draws inside kernels."
    )
    sanitize: bool = Field(
        False,
        description="Run every compiled region beside PyTorch's own kernels and stop at the first difference.",
    )
    gemm: Literal["auto", "onednn", "default"] = Field(
        "auto",
        description="fp32 matrix products on CPU: 'auto' takes oneDNN where it was measured faster at fp32 accuracy.",
    )
    buffers: Choice = Field(
        "auto",
        description="Reuse large CPU buffers from step to step, not return them to the system; 'auto': on Linux.",
    )
    cache: bool = Field(True, description="Keep compiled programs on disk, shared by later processes.")
    summary: bool = Field(True, description="Log one line for each compiled graph.")

    @classmethod
    def load(cls, source: Config | dict[str, Any] | str | Path | None = None) -> Config:
        """Build a configuration from a mapping, a JSON file's path, or nothing (the defaults).

        Raises:
            ConfigError: an unknown key (with the nearest valid one), a wrong type, or an unreadable file.
        """
        if isinstance(source, Config):
            return source
        where = "options"
        if isinstance(source, (str, Path)):
            where = str(source)
            source = _read_json(Path(source))
        values = dict(source or {})
        for key in values:
            if key not in cls.model_fields:
                raise ConfigError(
                    f"{where}: unknown option {key!r}.{nearest(str(key), cls.model_fields)} "
                    f"Valid options: {', '.join(cls.model_fields)}."
                )
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where}: option {name!r}: {first['msg']} (got {first['input']!r}).") from None

    def digest(self) -> str:
        """SHA-256 of the whole object, except fields marked ``output_only``, which say only where files are written."""
        unrelated = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("output_only")
        }
        return hashlib.sha256(self.model_dump_json(exclude=unrelated).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object of options, got {type(value).__name__}.")
    return value
