"""The configuration: one frozen object, and the whole of it is the cache key (but where dumps go).

It is built from a dict, a JSON file or ``torch.compile(options=...)``. Unknown keys are errors that name the nearest
valid key, so that a misspelt option never silently does nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dscompile.errors import ConfigError, nearest
from dscompile.sparse_section import SparseAttentionConfig

Choice = Literal["auto", "on", "off"]


def _whole(value: Any) -> Any:
    """``5e8`` is how DeepSpeed's files write an integer, and JSON reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
"""A number of elements (not bytes), as DeepSpeed counts them."""


class ZeroConfig(BaseModel):
    """How parameters are sharded, in the names of DeepSpeed's ``zero_optimization`` where it has the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stage: Literal[0, 1, 2, 3] = Field(
        3, description="0 replicates; 1 and 2 shard masters and optimizer state (2: gradients too); 3 parameters too."
    )
    # DeepSpeed's default for these two is 5e8: one bucket, and a copy of all gradients, for any model below that.
    reduce_bucket_size: Elements = Field(8_000_000, description="Most elements reduced by one collective.")
    allgather_bucket_size: Elements = Field(8_000_000, description="Most elements gathered by one collective.")
    stage3_prefetch_bucket_size: Elements = Field(50_000_000, description="Most elements gathered ahead of their use.")
    stage3_param_persistence_threshold: Elements = Field(
        100_000, description="Parameters of fewer elements stay gathered between forward and backward."
    )
    keep_elements: Elements = Field(
        0, description="Gathered elements that may stay between forward and backward, beyond the small and last ones."
    )
    overlap_comm: bool = Field(True, description="Launch collectives early and wait for them late.")
    reduce_micro_batches: bool = Field(
        False,
        description="Stages 2 and 3: reduce every micro-batch's gradients, inside no_sync() too. No rank then holds "
        "whole gradients, and a window moves as many times the bytes as it has micro-batches.",
    )


Precision = Literal["fp32", "bf16", "fp16"]


class PrecisionConfig(BaseModel):
    """In which types a distributed model computes and communicates; FSDP2's ``MixedPrecisionPolicy`` has these names.

    Masters, ``.grad`` and optimizer state are fp32 whatever is chosen here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    param_dtype: Precision = Field("fp32", description="Type of the parameters that the model computes with.")
    reduce_dtype: Precision | None = Field(
        None, description="Type in which gradients travel (DeepSpeed's communication_data_type); default: param_dtype."
    )
    grad_dtype: Precision | None = Field(
        None, description="Type of what no_sync() accumulates (DeepSpeed's grad_accum_dtype); default: the masters'."
    )
    buffer_dtype: Precision | None = Field(
        None, description="Convert floating-point buffers to this type, once (DeepSpeed: param_dtype); default: none."
    )
    cast_forward_inputs: bool = Field(
        True, description="Cast floating-point arguments of the distributed module's forward to param_dtype, as FSDP2."
    )


class RecomputeConfig(BaseModel):
    """What backward computes again instead of saving it, in the names of DeepSpeed's transformer kernels."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gelu_checkpoint: bool = Field(False, description="The outputs of GELU and SiLU, from their saved inputs.")
    normalize_invertible: bool = Field(
        False, description="The outputs of LayerNorm and RMSNorm, from their saved inputs; any weight will do."
    )
    attn_dropout_checkpoint: bool = Field(
        False,
        description="What dropout leaves of attention's probabilities, from these and the mask, both saved; on CPUs.",
    )


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
        min_length=1,
        description="Directory that receives the run's artifact: manifest, text, tables.",
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
    kernels: Literal["auto", "inductor"] = Field(
        "auto",
        description="On a GPU: 'auto' runs our Triton kernels in regions where they move fewer bytes than Inductor's.",
    )
    gemm: Literal["auto", "amx_int8", "amx", "onednn", "default"] = Field(
        "auto",
        description="fp32 matrix products on CPU: 'auto' takes our kernel on AMX tiles of bf16 or oneDNN where that "
        "was measured faster at fp32 accuracy; 'amx' takes our kernel for every product, 'amx_int8' the one on tiles "
        "of integers, whose last bits may differ in a resumed run.",
    )
    attention: Literal["auto", "kernel", "aten"] = Field(
        "auto",
        description="Dense attention on CPU: 'auto' takes our kernel where it was measured faster than PyTorch's.",
    )
    norm_backward: Literal["auto", "kernel", "inductor"] = Field(
        "auto",
        description="Gradients of norms on CPU: 'auto' takes our one-sweep kernel where it was measured faster.",
    )
    buffers: Choice = Field(
        "auto",
        description="Reuse large CPU buffers from step to step, not return them to the system; 'auto': on Linux.",
    )
    fused_loss: Choice = Field(
        "auto",
        description="Cross-entropy of a projection in chunks, so that the logits of a batch never exist; 'auto': where "
        "that holds fewer bytes.",
    )
    zero: ZeroConfig = Field(
        default_factory=lambda: ZeroConfig.model_validate({}), description="Sharding of parameters over ranks (ZeRO)."
    )
    precision: PrecisionConfig = Field(
        default_factory=lambda: PrecisionConfig.model_validate({}),
        description="Types of distributed parameters and gradients.",
    )
    sparse_attention: SparseAttentionConfig | None = Field(
        None, description="Make attention block-sparse, in the keys of DeepSpeed's section; unset: leave it dense."
    )
    recompute: RecomputeConfig | None = Field(
        None, description="Cheap activations that backward computes again, to save fewer bytes; unset: none."
    )
    rank_timeout: float = Field(
        30.0,
        ge=0,
        description="Seconds within which ranks end after another died, raised or diverged; 0: unwatched.",
    )
    step_entry: bool = Field(
        True,
        description="train_batch of an engine runs forward and backward as one program where the model allows it.",
    )
    cache: bool = Field(True, description="Keep compiled programs on disk, shared by later processes.")
    summary: bool = Field(True, description="Log one line for each compiled graph.")

    @classmethod
    def load(cls, source: Config | Mapping[str, Any] | str | Path | None = None) -> Config:
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
        if not isinstance(source, (Mapping, type(None))):
            raise ConfigError(f"{where}: expected a mapping of options, got {type(source).__name__} {source!r}.")
        values = dict(source or {})
        _reject_unknown(where, "", values, cls)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where}: option {name!r}: {first['msg']} (got {first['input']!r}).") from None

    def updated(self, options: dict[str, Any] | None) -> Config:
        """The configuration with some options replaced. Raises :class:`ConfigError` as :meth:`load` does."""
        if not options:
            return self
        given = Config.load(options)
        return self.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})

    def digest(self) -> str:
        """SHA-256 of the whole object, except fields marked ``output_only``, which say only where files are written."""
        unrelated = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("output_only")
        }
        return hashlib.sha256(self.model_dump_json(exclude=unrelated).encode()).hexdigest()


def _reject_unknown(where: str, prefix: str, values: dict[str, Any], model: type[BaseModel]) -> None:
    """Name the nearest valid key of the first unknown one, in nested sections too."""
    for key, value in values.items():
        if key not in model.model_fields:
            valid = [prefix + name for name in model.model_fields]
            raise ConfigError(
                f"{where}: unknown option {prefix + str(key)!r}.{nearest(prefix + str(key), valid)} "
                f"Valid options: {', '.join(valid)}."
            )
        annotation = model.model_fields[key].annotation
        for section in get_args(annotation) or (annotation,):
            if isinstance(section, type) and issubclass(section, BaseModel) and isinstance(value, dict):
                _reject_unknown(where, f"{prefix}{key}.", value, section)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a JSON text file: {error.reason} at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object of options, got {type(value).__name__}.")
    return value
