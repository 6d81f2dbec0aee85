"""Tiny random Llamas, and engines that run them: small enough that a test can afford a transformers model beside it.

Norms and biases are random too: ones and zeros would hide faults. The KV pool starts poisoned with NaN, and block ids
can be shuffled, so that whatever reads a slot it should not shows at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.batch import build_input, plan_step
from engine.block_manager import Holder, HolderKind
from engine.build import BuiltEngine
from engine.engine import Engine, EngineSpec, ModelRunner
from engine.grammar import Grammars
from engine.host_tier import HostTier
from engine.kv_cache import DTYPES, KVCache
from engine.layer_groups import LayersStored
from engine.model_runner import TorchRunner, build_model
from engine.models.config import ModelConfig
from engine.models.decoder import Weights
from engine.models.weights import expected_shapes
from engine.planes import attention_layout
from engine.scheduler import Batch, SchedulerLimits
from engine.types import Add, FinishReason, Key, Request, Sampled, SamplingParams, StepOutputs
from kernels.dispatch import Kernels
from kernels.reference.quantized import Bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIGMA = 0.15
MAX_TURNS = 10_000  # a run that needs more than this hangs


def tiny_config(**overrides: Any) -> ModelConfig:
    """A two-layer Llama with grouped heads; keyword arguments replace fields."""
    config = ModelConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        rms_norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, max_context=512, tie_embeddings=False,
        attention_bias=False, mlp_bias=False, eos_token_ids=(), bos_token_id=None, architecture="LlamaForCausalLM",
    )  # fmt: skip
    return replace(config, **overrides)


def random_weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Every tensor of the model, normal with deviation SIGMA; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * SIGMA + ("norm" in name)).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def hf_model(config: ModelConfig, weights: Weights) -> PreTrainedModel:
    """The oracle: transformers' model of the same family with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import, which most tests do not need

    model_type = _MODEL_TYPES[config.architecture]
    theirs = AutoConfig.for_model(model_type, **_hf_fields(config))
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    missing, unknown = model.load_state_dict(_hf_weights(config, weights), strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    if config.tie_embeddings:
        model.tie_weights()
    return model.eval()


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}  # fmt: skip


def _hf_fields(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of transformers' configuration of this family."""
    rope, windows = _hf_rope(config), config.layer_windows
    original = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    length = config.rope_scaling.original_max_context if config.rope_scaling and original else config.max_context
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope, "max_position_embeddings": length, "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None, "eos_token_id": list(config.eos_token_ids) or None, "pad_token_id": None,
        "sliding_window": next((window for window in windows if window is not None), None),
    }  # fmt: skip
    if config.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"):
        fields["attention_bias"] = config.attention_bias
    if config.architecture == "LlamaForCausalLM":
        fields["mlp_bias"] = config.mlp_bias
    if config.architecture.startswith("Qwen"):
        fields["use_sliding_window"] = bool(windows)
    if config.architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        fields["layer_types"] = [
            "full_attention" if config.window_of(layer) is None else "sliding_attention"
            for layer in range(config.num_layers)
        ]
    if config.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        fields["query_pre_attn_scalar"] = round(config.attention_scale**-2)
    return fields | _hf_experts(config)


def _hf_rope(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_max_context
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return rope | {name: getattr(scaling, name) for name in names.get(scaling.kind, ())}


def _hf_experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    if config.architecture == "MixtralForCausalLM":
        return {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
    return {
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size, "norm_topk_prob": moe.normalize, "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.num_layers) if layer not in moe.layer_ids],
    }  # fmt: skip


def _hf_weights(config: ModelConfig, weights: Weights) -> Weights:
    """As transformers holds them in memory: experts stacked, and Gemma's norms less one."""
    found = dict(weights)
    if config.wide_norms:
        found |= {name: tensor - 1 for name, tensor in weights.items() if name.endswith("norm.weight")}
    for layer in config.moe.layer_ids if config.moe is not None else ():
        experts = f"model.layers.{layer}.mlp.experts."
        each = range(config.moe.num_experts if config.moe is not None else 0)
        gate, up, down = (
            torch.stack([found.pop(f"{experts}{index}.{part}_proj.weight") for index in each])
            for part in ("gate", "up", "down")
        )
        found[f"{experts}gate_up_proj"] = torch.cat((gate, up), dim=1)
        found[f"{experts}down_proj"] = down
    return found


def tiny_engine(
    config: ModelConfig, weights: Weights, *, num_blocks: int = 64, batch_invariant: bool = True,
    shuffle_seed: int | None = None, host_tier_blocks: int = 0, grammars: Grammars | None = None,
    kernels: Kernels = "auto", bits: Bits = 16, **limits: Any,
) -> BuiltEngine:  # fmt: skip
    """An engine over a poisoned pool. `limits` replace fields of its SchedulerLimits; `weights` are left alone."""
    torch.set_num_threads(1)  # as engine.build does by default
    defaults: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 512, "max_batch_seqs": 64, "prefill_chunk": 256}
    bounds = SchedulerLimits(**(defaults | limits))
    dtype = next(name for name, kind in DTYPES.items() if kind == weights["model.embed_tokens.weight"].dtype)
    layout = attention_layout(
        config.num_layers, config.num_kv_heads, config.head_dim, bounds.block_size, dtype, config.layer_windows
    )
    bounds = replace(bounds, groups=layout.groups)
    spec = EngineSpec(
        bounds, num_blocks, config.max_context, config.vocab_size, frozenset(config.eos_token_ids), hash_key=b"tiny"
    )
    with torch.inference_mode():
        model = build_model(
            config, dict(weights), bounds.block_size, batch_invariant, kernels=kernels, bits=bits
        )  # fmt: skip
        cache = KVCache(layout, num_blocks, "cpu", None)
        cache.fill(float("nan"))
    tier_bytes = host_tier_blocks * layout.bytes_per_block
    engine = Engine(spec, HostTier(layout, cache, tier_bytes) if tier_bytes else None)
    if shuffle_seed is not None:
        shuffle_blocks(engine, shuffle_seed)
    runner = TorchRunner(model, cache, bounds.block_size, grammars)
    return BuiltEngine(engine, runner, cache, runner)


def shuffle_blocks(engine: Engine, seed: int) -> None:
    """From now on the engine's free blocks are handed out in a random order."""
    holder = Holder(HolderKind.RESERVATION, Key("shuffle", 0))
    block_ids = engine.blocks.allocate(holder, engine.blocks.num_available)
    assert block_ids is not None
    random.Random(seed).shuffle(block_ids)
    engine.blocks.free(holder, block_ids)


def request(name: str, prompt_ids: Iterable[int], max_tokens: int = 8, **sampling: Any) -> Request:
    """A greedy request, unless `sampling` says otherwise."""
    params = SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0} | sampling))
    return Request(name, tuple(prompt_ids), params)


def random_prompt(config: ModelConfig, length: int, seed: int) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(config.vocab_size) for _ in range(length))


def turn(engine: Engine, runner: ModelRunner) -> tuple[StepOutputs, StepOutputs] | None:
    """One turn as a step runner drives it: what came out before the step and after it; None without work."""
    batch = engine.begin()
    before = engine.take_outputs()
    if batch is None:
        return None
    engine.finish(batch, runner.execute(batch))
    return before, engine.take_outputs()


def run(engine: Engine, runner: ModelRunner, requests: Items[Request]) -> dict[Key, list[int]]:
    """Add all requests and drive the engine until it is idle: the new tokens of each."""
    tokens: dict[Key, list[int]] = {item.key: [] for item in requests}
    for item in requests:
        engine.handle(Add(item))
    for _ in range(MAX_TURNS):
        outputs = turn(engine, runner)
        for part in outputs or (engine.take_outputs(),):
            for output in part.tokens:
                assert output.finish is not FinishReason.ERROR, output.error
                tokens[output.key] += output.token_ids
        if outputs is None:
            assert not engine.has_work, "nothing can go on, yet not all is done"
            return tokens
    raise AssertionError("the engine does not come to an end")


class LogitRecorder:
    """A runner that keeps the logits of every position it computes. Greedy."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.logits: dict[Key, dict[int, torch.Tensor]] = {}

    @torch.inference_mode()
    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        if batch.copies:
            self.runner.cache.copy(batch.copies)
        return [self._record(item.sequence.key, item.start, rows, item.samples) for item, rows in self._compute(batch)]

    def of(self, key: Key) -> torch.Tensor:
        """[positions, vocab] from the first position on; none is missing."""
        rows = self.logits[key]
        return torch.stack([rows[position] for position in range(len(rows))])

    def _record(self, key: Key, start: int, rows: torch.Tensor, samples: bool) -> Sampled:
        self.logits.setdefault(key, {}).update((start + index, row) for index, row in enumerate(rows))
        return Sampled((int(rows[-1].argmax()),)) if samples else Sampled()

    def _compute(self, batch: Batch):
        """Each item with the logits [num_new, vocab] of its rows, which a KV slot of its own tells apart."""
        runner, model = self.runner, self.runner.model
        layout = runner.cache.layout
        plan = plan_step(batch, layout.groups, layout.block_size)
        step = build_input(plan, layout.groups, layout.block_size, model.backend, model.attention)
        wanted = torch.zeros(len(step.token_ids), dtype=torch.int64)
        wanted[: step.num_tokens] = torch.arange(step.num_tokens)
        logits = model.forward(replace(step, sample_rows=wanted, num_samples=step.num_tokens), runner.cache).logits
        slots = zip(step.groups[0].block_ids.tolist(), step.offsets.tolist(), strict=True)
        row_of = {slot: row for row, slot in enumerate(slots)}
        for item in batch.scheduled:
            places = [divmod(position, layout.block_size) for position in range(item.start, item.start + item.num_new)]
            rows = [row_of[item.sequence.tables[0][index], offset] for index, offset in places]
            yield item, logits[rows]
