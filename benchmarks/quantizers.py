"""What whole numbers keep of weights, beside torchao's and GGUF's: errors of random weights, perplexity of a model.

    python -m benchmarks.quantizers [--quick] [--threads N] [--peers FOLDER] [--json FILE]

1. Gaussian weights in bfloat16 go through each quantiser and back, to float32: the error of the whole matrix, the
   largest of one weight, and that of products with Gaussian rows. What our backend multiplies by is checked to be it.
2. Quantisers of 8 bits have a scale in float32 for each row and are symmetric: ours has numbers from -127 to 127,
   torchao's from -128. Those of 4 bits have a scale and a shift for groups of 32: ours and GGUF's Q4_1 in float16,
   torchao's in bfloat16. Q4_1 and torchao's `tinygemm` cut a group's range evenly; torchao's `hqq` and ours look for
   less error, ours of the sum of squares. torchao is judged by the better of its two.
3. Perplexity of the default model over a fixed text, by our engine (benchmarks/perplexity.py). Unquantised in float32
   it must be transformers'. The model comes from Q4_1, of which 4 bits lose next to nothing. So it is judged again
   after what its matrices read and write was scaled by random factors that cancel: the same model, on no grid. (Noise
   would not do: with so little that the model stays whole, most weights are rounded back.) torchao's weights run in the
   same engine. Where layers have int4, the head has int8.

torchao is installed into FOLDER once (benchmarks/engine_peers.py). The whole run takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.engine_peers import DEFAULT_PEERS, PROGRAMS, TORCHAO, install, python_of
from benchmarks.perplexity import WINDOW, our_perplexity, text_windows, their_perplexity
from benchmarks.report import Row, Target, machine, print_table, print_targets, target, write_json
from engine.config import EngineConfig, ModelSource
from engine.models.config import ModelConfig
from engine.models.decoder import Weights
from engine.models.weights import load_weights
from engine.setup import EngineSetup, plan_engine
from kernels.dispatch import backend_for
from kernels.reference.quantized import Bits, quantize

SHAPES = ((576, 576), (3072, 576), (576, 1536), (4096, 4096))  # [out, in]: the default model's, and a larger one's
QUICK_SHAPES = SHAPES[:3]
NUM_ROWS = 64  # of products
NUM_WINDOWS, QUICK_NUM_WINDOWS = 12, 2
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MOST_SCALED = 1.25  # the largest factor; the least is one over it
EQUAL, ROUNDED = 1e-3, 5e-3  # what may differ in float32, and where bfloat16 rounds
WAYS = ("tinygemm", "hqq")  # of torchao, with 4 bits


@dataclass(frozen=True, slots=True)
class Errors:
    """Of a weight that was restored. whole, product: relative, of Frobenius norms; most: of one weight, in standard
    deviations."""

    whole: float
    most: float
    product: float


def main() -> None:
    options = _options()
    install(options.peers, [TORCHAO])
    with tempfile.TemporaryDirectory() as folder:
        torchao = Torchao(options.peers, Path(folder))
        ways = WAYS[:1] if options.quick else WAYS
        errors = random_errors(QUICK_SHAPES if options.quick else SHAPES, torchao, ways)
        error_rows: list[Row] = [
            {
                "shape": shape, "quantiser": name, "error": f"{one.whole:.5f}", "most": f"{one.most:.4f}",
                "error of products": f"{one.product:.5f}",
            }
            for shape, found in errors.items()
            for name, one in found.items()
        ]  # fmt: skip
        print_table("Gaussian weights there and back; `most` in standard deviations", error_rows)
        windows, source = text_windows(QUICK_NUM_WINDOWS if options.quick else NUM_WINDOWS)
        found = perplexities(windows, torchao, options.threads, ways)
    rows = [_row(name, found) for name in found]
    print_table(f"Perplexity of the default model, {len(windows)} x {WINDOW} tokens of {source}; {machine()}", rows)
    targets = [*_error_targets(errors), *_perplexity_targets(found)]
    print_targets(targets)
    write_json(options.json, [*error_rows, *rows], targets)


# --- random weights -------------------------------------------------------------------------------------------


def random_errors(
    shapes: Sequence[tuple[int, int]], torchao: Torchao, ways: Sequence[str]
) -> dict[str, dict[str, Errors]]:
    """By shape and quantiser."""
    chance = torch.Generator().manual_seed(0)
    weights = {f"{out} x {into}": torch.randn(out, into, generator=chance).bfloat16() for out, into in shapes}
    restored = {
        "int8, ours": {name: _ours(weight, 8) for name, weight in weights.items()},
        "int8, torchao": torchao.restored(weights, "int8"),
        "int4, ours": {name: _ours(weight, 4) for name, weight in weights.items()},
        **{f"int4, torchao {way}": torchao.restored(weights, way) for way in ways},
        "int4, GGUF Q4_1": {name: _q4_1(weight) for name, weight in weights.items()},
    }
    rows = {name: torch.randn(NUM_ROWS, weight.shape[1], generator=chance) for name, weight in weights.items()}
    return {
        name: {kind: _errors(weight.float(), found[name], rows[name]) for kind, found in restored.items()}
        for name, weight in weights.items()
    }


def _ours(weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Ends the program if our backend multiplies by anything else."""
    quantized = quantize(weight, bits)
    assert quantized is not None
    restored = quantized.restored()
    x = torch.randn(NUM_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.float() @ restored.T
    got = backend_for(weight, "auto", is_invariant=True).linear(weight, None, bits=bits)(x).float()
    if (got - wanted).norm() > ROUNDED * wanted.norm():
        raise SystemExit(f"wrong: our product with {bits} bits is not that of the weights which they keep")
    return restored


def _q4_1(weight: torch.Tensor) -> torch.Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    numbers = quantize(weight.float().numpy(), GGMLQuantizationType.Q4_1)
    return torch.from_numpy(dequantize(numbers, GGMLQuantizationType.Q4_1))


def _errors(weight: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> Errors:
    error = restored - weight
    product = (x @ error.T).norm() / (x @ weight.T).norm()
    return Errors(float(error.norm() / weight.norm()), float(error.abs().max()), float(product))


def _error_targets(errors: dict[str, dict[str, Errors]]) -> list[Target]:
    """Of the shape at which ours is worst."""
    eight = max(one["int8, ours"].whole / one["int8, torchao"].whole for one in errors.values())
    four = max(one["int4, ours"].whole / _least(one, "int4, torchao") for one in errors.values())
    ratios = {"int8": eight, "int4": four}
    return [target("quantizers", f"{name} error over torchao's", ratio) for name, ratio in ratios.items()]


def _least(errors: dict[str, Errors], begin: str) -> float:
    return min(one.whole for name, one in errors.items() if name.startswith(begin))


# --- perplexity -----------------------------------------------------------------------------------------------


def perplexities(
    windows: Sequence[tuple[int, ...]], torchao: Torchao, num_threads: int, ways: Sequence[str]
) -> dict[str, float]:  # fmt: skip
    """By name. Ends the program if ours is not transformers'."""
    found: dict[str, float] = {}

    def note(name: str, perplexity: float) -> None:
        print(f"{name}: {perplexity:.4f}", flush=True)
        found[name] = perplexity

    wide, setup = _setup("float32", num_threads), _setup("bfloat16", num_threads)
    untied = replace(setup, model=replace(setup.model, tie_embeddings=False))
    plain = load_weights(wide.files, wide.model, torch.float32)
    note("float32, transformers", their_perplexity(wide.model, plain, windows, num_threads))
    note("float32", our_perplexity(wide, plain, windows))
    if abs(found["float32"] / found["float32, transformers"] - 1) > EQUAL:
        raise SystemExit("wrong: our perplexity in float32 is not transformers'")
    weights = {name: tensor.bfloat16() for name, tensor in plain.items()}
    weights = _rounded(plain)
    bits: dict[str, Bits] = {"bfloat16": 16, "int8": 8, "int4": 4}
    for name, kept in bits.items():
        note(name, our_perplexity(setup, weights, windows, kept))
    note("int8 of torchao", our_perplexity(untied, torchao_weights(weights, torchao, "int8"), windows))
    weights = _rounded(rescaled(plain, setup.model))
    for name, kept in bits.items():
        note(f"rescaled, {name}", our_perplexity(setup, weights, windows, kept))
    if abs(found["rescaled, bfloat16"] / found["bfloat16"] - 1) > ROUNDED:
        raise SystemExit("wrong: the rescaled model is another")
    for way in ways:
        kept = torchao_weights(weights, torchao, way)
        note(f"rescaled, int4 of torchao {way}", our_perplexity(untied, kept, windows))
    return found


def rescaled(weights: Weights, config: ModelConfig) -> Weights:
    """The same Llama on other numbers: norms by so much, what reads them by the inverse; and so from v to o, and from
    up to down."""
    found, chance = dict(weights), torch.Generator().manual_seed(0)

    def scale(writer: str, readers: Sequence[str], repeats: int = 1) -> None:
        """writer: a norm's weight or a matrix, whose rows are scaled. Heads of v are read by `repeats` heads of o."""
        factors = MOST_SCALED ** (2 * torch.rand(len(found[writer]), generator=chance) - 1)
        found[writer] = found[writer] * factors.view((-1, 1) if found[writer].dim() == 2 else (-1,))
        read = factors.view(-1, config.head_dim).repeat_interleave(repeats, dim=0).flatten()
        for reader in readers:
            found[reader] = found[reader] / read

    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        queries = [f"{attention}{name}_proj.weight" for name in "qkv"]
        gate, up, down = (f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        scale(f"{prefix}input_layernorm.weight", queries)
        scale(queries[2], [f"{attention}o_proj.weight"], config.num_heads // config.num_kv_heads)
        scale(f"{prefix}post_attention_layernorm.weight", [gate, up])
        scale(up, [down])
    return found


def torchao_weights(weights: Weights, torchao: Torchao, how: str) -> Weights:
    """What torchao keeps of layers, and, with 8 bits, of the head, which is tied to the embedding."""
    layers = {name: tensor for name, tensor in weights.items() if name.endswith("_proj.weight")}
    head = {HEAD: weights[EMBEDDING]}
    if how == "int8":
        return weights | _rounded(torchao.restored(layers | head, how))
    return weights | _rounded(torchao.restored(layers, how) | torchao.restored(head, "int8"))


def _rounded(weights: Weights) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def _setup(dtype: str, num_threads: int) -> EngineSetup:
    config = EngineConfig(
        threads=num_threads, prefix_cache=False, num_blocks=256, max_batch_tokens=WINDOW, prefill_chunk=WINDOW
    )
    return plan_engine(ModelSource.model_validate({"dtype": dtype}), config, hash_key=bytes(16))


def _perplexity_targets(found: dict[str, float]) -> list[Target]:
    theirs = min(value for name, value in found.items() if name.startswith("rescaled, int4 of torchao"))
    return [
        target("quantizers", "int8 perplexity over bfloat16's", found["int8"] / found["bfloat16"]),
        target("quantizers", "int4 perplexity over torchao's, rescaled", found["rescaled, int4"] / theirs),
    ]


def _row(name: str, found: dict[str, float]) -> Row:
    base = found["rescaled, bfloat16" if name.startswith("rescaled") else "bfloat16"]
    return {"weights": name, "perplexity": f"{found[name]:.4f}", "over bfloat16": f"{found[name] / base:.4f}"}


# --- torchao --------------------------------------------------------------------------------------------------


class Torchao:
    """In an environment of its own; weights go there and back as files in `folder`."""

    def __init__(self, peers: Path, folder: Path) -> None:
        self._python = python_of(peers, TORCHAO)
        self._folder = folder

    def restored(self, weights: Weights, how: str) -> Weights:
        """What is kept of each weight, in float32. How: benchmarks/peers/torchao_weights.py."""
        print(f"torchao quantises to {how}", flush=True)
        source, result = self._folder / "weights.safetensors", self._folder / "restored.safetensors"
        save_file(weights, source)
        command = [self._python, str(PROGRAMS / "torchao_weights.py"), how, str(source), str(result)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"wrong: torchao failed:\n{done.stderr}")
        return load_file(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less text, no hqq: under a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=DEFAULT_PEERS, metavar="FOLDER", help="where torchao is")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
