"""Tokenizer and chat templates against transformers, for the default model and for saved folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import InvalidRequest, ModelError
from engine.models.chat_template import ChatTemplate
from engine.models.config import ModelConfig
from engine.models.detokenizer import IncrementalDetokenizer
from engine.models.gguf_file import read_gguf
from engine.models.gguf_tokenizer import build_tokenizer
from engine.models.loader import load_config
from engine.models.store import ModelFiles, ModelKind
from engine.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "a" + " " * 17 + "b",
    "1234567890",
    "pi=3.14159 and 2^32=4294967296",
    "x1y22z333",
    "I'm, you're, they'll, WE'VE, don't",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 0}\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text<repo_name>",
    "<|im_start|almost",
    "你好，世界。これは日本語です。안녕하세요",
    "👩‍👩‍👧‍👦 family 🇨🇭 flag 👍🏽",
    "e\u0301 combining a\u0308\u0323 and café naïve Ω≈ç√∫",
    "Привет мир שלום مرحبا नमस्ते",
    "zero\u200bwidth nbsp\u00a0here \ufeff bom",
    "https://example.org/a?b=c&d=%20#frag",
    "½ ² Ⅷ ٣٤٥ digits of other scripts",
    "$$$!!! ... --- ===>",
    "\x00\x01\x7f control",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Why?  \n"}],
    [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4 <b>&amp;</b>"},
        {"role": "user", "content": "你好 👋"},
    ],
]


@pytest.fixture(scope="module")
def config(smollm2_files: ModelFiles) -> ModelConfig:
    return load_config(smollm2_files)


@pytest.fixture(scope="module")
def ours(smollm2_files: ModelFiles, config: ModelConfig) -> Tokenizer:
    return load_tokenizer(smollm2_files, config)


@pytest.fixture(scope="module")
def theirs(smollm2_files: ModelFiles) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the same file, with the pre-tokenizer that the file names.

    transformers 5.23 takes GPT-2's for `smollm`, which differs where white space precedes a digit; SmolLM2's own
    tokenizer.json, and llama.cpp, set every digit apart first."""
    path = smollm2_files.path
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    gpt2 = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    return tokenizer


@pytest.fixture(scope="module")
def folder(theirs: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, saved as Hugging Face files."""
    path = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def hf_files(folder: Path) -> ModelFiles:
    return ModelFiles("saved", ModelKind.HF, folder, ())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False) == text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_unchanged_transformers_agrees_where_no_space_precedes_a_digit(ours, smollm2_files):
    path = smollm2_files.path
    plain = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS[:7] + TEXTS[9:21]:
        assert ours.encode(text) == plain.encode(text)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_rendered_chat_equals_that_of_transformers(ours, theirs, messages, add_generation_prompt):
    rendered = ours.render_chat(messages, add_generation_prompt)
    assert rendered == theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)


def test_the_default_model_s_special_tokens(ours, theirs):
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.eos_token_ids == (theirs.eos_token_id,) == (2,)
    assert ours.bos_id == theirs.bos_token_id
    assert (
        ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special} == set(range(17))
    )
    assert ours.token_text(2) == "<|im_end|>"
    assert ours.token_text(ours.encode(" the")[0]) == " the"


def test_ids_outside_the_vocabulary_are_no_text(ours):
    assert ours.decode([49152, 10**9]) == ""
    assert ours.visible_ids([2, 49152, 300, 10**9]) == [300]
    assert ours.visible_ids([2, 300], skip_special=False) == [2, 300]


# --- saved folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_folder_gives_the_same_ids(folder, config, ours, text):
    assert load_tokenizer(hf_files(folder), config).encode(text) == ours.encode(text)


def test_a_saved_folder_renders_the_same_chat(folder, config, ours):
    saved = load_tokenizer(hf_files(folder), config)
    assert [saved.render_chat(messages) for messages in CHATS] == [ours.render_chat(messages) for messages in CHATS]
    assert (saved.eos_token_ids, saved.bos_id) == (ours.eos_token_ids, ours.bos_id)


def change_settings(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_end_tokens_of_config_and_tokenizer_are_united(copied, config):
    change_settings(copied, eos_token={"content": "<|endoftext|>", "lstrip": False})
    assert load_tokenizer(hf_files(copied), replace(config, eos_token_ids=(2, 5))).eos_token_ids == (2, 5, 0)


def test_a_template_may_be_in_the_settings_and_have_a_name(copied, config):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    change_settings(copied, chat_template="A{{ messages[0].content }}")
    assert load_tokenizer(hf_files(copied), config).render_chat(CHATS[0]) == "AHi"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    change_settings(copied, chat_template=named)
    assert load_tokenizer(hf_files(copied), config).render_chat(CHATS[0]) == "D"


def test_a_template_for_tools_is_used_where_there_are_tools(copied, config):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    change_settings(copied, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}])
    tokenizer = load_tokenizer(hf_files(copied), config)
    assert (tokenizer.render_chat(CHATS[0], tools=TOOLS), tokenizer.render_chat(CHATS[0], tools=[])) == ("T", "D")
    assert tokenizer.knows_tools and tokenizer.template_source == "DT"
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates/tool_use.jinja").write_text("F")
    assert load_tokenizer(hf_files(copied), config).render_chat(CHATS[0], tools=TOOLS) == "F"


def test_the_default_model_is_not_shown_tools_by_its_template(ours):
    assert not ours.knows_tools and "im_start" in ours.template_source


def test_special_tokens_that_mark_something_can_be_shown(ours):
    end = ours.special_id("<|im_end|>")
    assert end == 2 and ours.special_id("the") is None and ours.special_id("<nothing>") is None
    ids = [*ours.encode("a"), 1, end, *ours.encode("b")]
    detokenizer = IncrementalDetokenizer(ours, shown=frozenset([end]))
    assert detokenizer.push(ids) + detokenizer.flush() == "a<|im_end|>b"


def test_without_a_template_chat_is_an_invalid_request(copied, config):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    change_settings(copied, chat_template=None)
    tokenizer = load_tokenizer(hf_files(copied), config)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat(CHATS[0])


def test_a_missing_or_broken_tokenizer_file_is_named(copied, config):
    (copied / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is no valid tokenizer"):
        load_tokenizer(hf_files(copied), config)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load_tokenizer(hf_files(copied), config)


# --- templates ------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"b": 1, "a": [True, None]}}}
]


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] | trim }}]\n"
        "  {% endif %}\n{% endfor %}{{ eos_token }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}",
        "{% if tools %}{{ tools[0] | tojson }}{% endif %}{% if documents %}no{% endif %}",
        "{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(messages[0].content) }}{{ undefined_name }}",
    ],
)
def test_templates_render_as_in_transformers(theirs, source):
    template = ChatTemplate(source, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token})
    for messages in CHATS:
        rendered = template.render(messages, add_generation_prompt=False, tools=TOOLS)
        assert rendered == theirs.apply_chat_template(messages, chat_template=source, tools=TOOLS, tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].missing.deeper }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_an_invalid_request(source):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(CHATS[0])
    assert caught.value.param == "messages"


def test_a_refusal_keeps_the_template_s_own_words():
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(CHATS[0])


def test_a_malformed_template_is_the_model_s_fault():
    with pytest.raises(ModelError, match="the chat template is malformed"):
        ChatTemplate("{% if %}", {})


# --- GGUF metadata --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata(smollm2_files: ModelFiles) -> dict:
    return dict(read_gguf(smollm2_files.path).metadata)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": 5}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["no-such token-here"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id"),
    ],
)
def test_a_vocabulary_that_cannot_be_built_names_its_key(metadata, change, field):
    with pytest.raises(ModelError, match=field) as caught:
        build_tokenizer(metadata | change)
    assert caught.value.param == field


def pieces_of(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    assert backend.pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["a", "  ", "1", "2", "3", "4", " b", "'s", "!!", "\n"]),
        ("gpt-2", ["a", " ", " 1234", " b", "'s", "!!", "\n"]),
        ("default", ["a", " ", " 1234", " b", "'s", "!!", "\n"]),
        ("llama-bpe", ["a", " ", " ", "123", "4", " b", "'s", "!!\n"]),
        ("qwen2", ["a", " ", " ", "1", "2", "3", "4", " b", "'s", "!!\n"]),
    ],
)
def test_each_pre_tokenizer_cuts_text_as_its_vocabulary_expects(metadata, pre, pieces):
    backend = build_tokenizer(metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    assert pieces_of(backend, "a  1234 b's!!\n") == pieces


def test_bos_is_added_when_the_file_says_so(metadata):
    backend = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert backend.encode("hi").ids[0] == 1
    assert backend.encode("hi", add_special_tokens=False).ids == backend.encode("hi").ids[1:]
