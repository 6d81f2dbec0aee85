"""Config models of the engine and of the model it runs (pydantic: from YAML)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Quantization = Literal["none", "int8", "int4"]


Cores = Literal["any", "auto"] | tuple[Annotated[int, Field(ge=0)], ...]


class StrictModel(BaseModel):
    """Unknown keys are refused, nothing changes after load."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSource(StrictModel):
    """Which model to serve."""

    name: str = Field(
        default="smollm2-135m-instruct", min_length=1, description="catalogue name, folder, .gguf file or hub name"
    )
    served_name: str | None = Field(default=None, description="name in the API; the reference's last part when null")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of weights and KV")
    quantization: Quantization = Field(
        default="none",
        description="of linear layers' weights, when they are loaded: int8 by rows, int4 in groups of 32 (head: int8)",
    )
    max_context: int | None = Field(
        default=None, ge=8, description="longest prompt + output in tokens; the model's own when null"
    )
    cache_dir: str | None = Field(default=None, description="where pulled models live; ~/.cache/steelyard when null")
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "json"] = Field(
        default="auto", description="how the model writes calls of functions; auto: as its chat template shows"
    )
    reasoning: Literal["auto", "none", "think", "bracket", "thinking", "seed"] = Field(
        default="auto", description="the marks around the model's reasoning; auto: as its chat template shows"
    )
    pooling: Literal["auto", "last", "mean"] = Field(
        default="auto", description="how hidden states become an embedding; auto: as the model's files say, if they do"
    )

    @model_validator(mode="after")
    def _numbers_fit(self) -> ModelSource:
        if self.quantization != "none" and self.dtype != "bfloat16":
            raise ValueError(f"quantization {self.quantization} needs dtype bfloat16")
        return self


class EngineConfig(StrictModel):
    """One engine: its blocks, its step budget, and where it runs."""

    device: Literal["cpu", "cuda"] = "cpu"
    block_size: int = Field(default=16, ge=1, le=256, description="tokens per block")
    num_blocks: int = Field(default=2048, ge=4, description="KV blocks in the pool")
    max_batch_tokens: int = Field(default=512, ge=1, description="token budget of one step")
    max_batch_seqs: int = Field(default=64, ge=1, description="sequences in one step")
    prefill_chunk: int = Field(default=256, ge=1, description="most prompt tokens of one sequence in a step")
    max_overtaken: int = Field(
        default=64,
        ge=0,
        description="how often prompts that fit a step pass a longer one; 0: first come first served",
    )
    prefix_cache: bool = True
    host_tier_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="blocks that prefix_cache evicts are kept in host memory up to this size; 0: off",
    )
    host_tier_folder: str | None = Field(default=None, description="keep them in a file in this folder instead")
    batch_invariant: bool | None = Field(default=None, description="null: on in float32, off in bfloat16")
    runner: Literal["process", "thread"] = Field(
        default="process", description="where steps run: a process of their own, or a thread"
    )
    pool: Literal["auto", "mapped", "ring"] = Field(
        default="auto", description="mapped: peers map the KV pool; ring: they read it through a ring; auto: by device"
    )
    kernels: Literal["auto", "torch"] = Field(
        default="auto",
        description="auto: Triton on cuda, native code where it can be compiled for the processor; torch: plain",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of one engine")
    cores: Cores = Field(
        default="any",
        description="each thread keeps to a core that no other engine of the host has. auto: of all; [0, 2]: of these",
    )
    calibrate_s: float = Field(
        default=1.5, ge=0, le=60, description="at its start an engine measures steps for at most so long; 0: off"
    )

    @model_validator(mode="after")
    def _budgets_fit(self) -> EngineConfig:
        if self.prefill_chunk > self.max_batch_tokens:
            raise ValueError(
                f"prefill_chunk ({self.prefill_chunk}) must not exceed max_batch_tokens ({self.max_batch_tokens})"
            )
        if self.host_tier_folder is not None and not self.host_tier_bytes:
            raise ValueError("host_tier_folder needs host_tier_bytes")
        if self.device == "cuda" and self.runner == "process":
            raise ValueError("runner 'process' shares KV by memory, which a cuda pool cannot; use runner: thread")
        if self.device == "cuda" and self.pool == "mapped":
            raise ValueError("a cuda pool cannot be mapped by others; use pool: ring")
        if self.cores != "any" and self.runner != "process":
            raise ValueError("cores are kept to by an engine in a process of its own; use runner: process")
        if self.pool == "ring" and self.runner == "process":
            raise ValueError("a pool behind a ring belongs to a thread of the worker; use runner: thread")
        return self

    @property
    def has_ring(self) -> bool:
        """Is the pool read through a ring only?"""
        return self.pool == "ring" or (self.pool == "auto" and self.device == "cuda")
