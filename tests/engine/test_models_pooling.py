"""Whether a model embeds, by the files that sentence-transformers, llama.cpp and transformers write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from engine.errors import ModelError
from engine.models.loader import load_config
from engine.models.pooling import Pooling, pooling_of
from engine.models.store import resolve
from engine.models.weights import load_weights

TransformerModule = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
PoolingModule = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NormalizeModule = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DenseModule = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_pooling(
    folder: Path, *on: str, modules: object = (TransformerModule, PoolingModule, NormalizeModule)
) -> None:
    """As sentence-transformers writes it."""
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode in on for mode in MODES}
    pooling = {"word_embedding_dimension": 32, **modes, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def pooling(path: Path, wanted: Any = "auto") -> Pooling:
    files = resolve(str(path))
    return pooling_of(files, load_config(files), wanted)


@pytest.fixture
def folder(tiny_llama: Callable[..., tuple[object, Path]]) -> Path:
    return tiny_llama()[1]


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("mode", "kind"), [("lasttoken", "last"), ("mean_tokens", "mean")])
def test_a_folder_of_sentence_transformers_says_how_it_embeds(folder: Path, mode: str, kind: str) -> None:
    write_pooling(folder, mode)
    found = pooling(folder)
    assert (found.kind, found.size) == (kind, 32)
    assert found.takes(32) and not found.takes(16)


def test_without_a_word_of_it_a_model_does_not_embed_but_the_config_may_say_how(folder: Path) -> None:
    assert pooling(folder).kind == "" and "do not say" in pooling(folder).reason
    assert pooling(folder, "mean").kind == "mean"
    write_pooling(folder, "mean_tokens")
    assert pooling(folder, "last").kind == "last"


@pytest.mark.parametrize(
    ("on", "modules", "word"),
    [
        (("cls_token",), (TransformerModule, PoolingModule), "pooling_mode_cls_token"),
        (("mean_tokens", "lasttoken"), (TransformerModule, PoolingModule), "and"),
        ((), (TransformerModule, PoolingModule), "no mode"),
        (("lasttoken",), (TransformerModule, PoolingModule, DenseModule), "Dense"),
        (("lasttoken",), (TransformerModule,), "Transformer"),
    ],
)
def test_what_we_do_not_compute_is_no_embedding_and_is_named(
    folder: Path, on: tuple[str, ...], modules: object, word: str
) -> None:
    write_pooling(folder, *on, modules=modules)
    found = pooling(folder)
    assert found.kind == "" and word in found.reason


@pytest.mark.parametrize("modules", [{}, [1], [TransformerModule, PoolingModule | {"path": "../elsewhere"}]])
def test_files_that_cannot_be_read_or_lead_elsewhere_are_errors(folder: Path, modules: object) -> None:
    write_pooling(folder, "lasttoken", modules=modules)
    with pytest.raises(ModelError, match=r"modules\.json"):
        pooling(folder)


def test_embeddings_may_be_cut_where_the_model_says_so(folder: Path) -> None:
    write_pooling(folder, "lasttoken")
    change_config(folder, is_matryoshka=True)
    assert pooling(folder).takes(7) and not pooling(folder).takes(33)
    change_config(folder, matryoshka_dimensions=[8, 16, 64])
    assert pooling(folder).cuts == (8, 16) and not pooling(folder).takes(7)


@pytest.mark.parametrize(("number", "kind"), [(None, ""), (0, ""), (1, "mean"), (2, ""), (3, "last"), (4, "")])
def test_a_gguf_file_says_how_it_embeds(tiny_gguf: Callable[..., Path], number: int | None, kind: str) -> None:
    found = pooling(tiny_gguf(**({} if number is None else {"llama.pooling_type": number})))
    assert (found.kind, found.size) == (kind, 64)
    assert bool(found.reason) == (not kind)


def test_a_model_saved_without_its_head_is_read(tiny_llama: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = tiny_llama()
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    files = resolve(str(tmp_path / "bare"))
    config = load_config(files)
    assert (config.architecture, config.tie_embeddings) == ("LlamaForCausalLM", True)
    weights = load_weights(files, config, torch.float32)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(weights[f"model.{name}"], tensor)
