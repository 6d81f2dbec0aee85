"""`python -m tests.engine.record_spm` trains small vocabularies with SentencePiece itself and writes spm_golden.json.

It needs the PyPI package `sentencepiece` (0.2.3 wrote the present file), which nothing else does: tests read the file.
What transformers makes of Gemma's real file is recorded beside it, since it takes half a minute to read it.
"""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.models.gguf_vocabulary import TokenType
from engine.models.store import resolve
from tests.oracle.prompts import OWN_TEXTS, REPOSITORY

GOLDEN_PATH = Path(__file__).with_name("spm_golden.json")
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"add_dummy_prefix": True},
    "gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["▁▁", "▁▁▁", "▁▁▁▁▁", "\n", "\n\n", "<b>", "</b>"]},
}
TEXTS = (
    "Hello, world!",
    " leading",
    "trailing ",
    "  two   three    four     five",
    "a\nb\n\nc\n\n\nd",
    "tabs\tand\r\nreturns",
    "1234567890 3.14 2^32",
    "The counterweight slides along the beam until the two sides are even.",
    "def push(self, item):\n    if self.count == len(self.items):\n        return None\n",
    "<b>bold</b> <b> spaced </b>",
    "Übersetze: Der Müller wog das Mehl",
    "你好，世界 ⚖️ 👩‍👩‍👧‍👦 e\u0301",
    "▁literal ▁▁ marks",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "licence licensed licensor licensing unlicensed",
)
GEMMA_TEXTS = (
    "",
    " ",
    "\t",
    "x" + " " * 31 + "y" + " " * 7,
    "\n" * 31 + "x" + "\n" * 40,
    "\t\tif x:\r\n\t\t\treturn  1",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<bos>a<eos> <unused42><pad>",
    "<start_of_turn almost <0x41> <unk>",
    "<table><tr><td> x </td></tr></table>",
    "Привет мир שלום مرحبا नमस्ते 안녕하세요 これは",
    "𝔘𝔫𝔦𠀀 \u200b\u00a0\ufeff ½ ² Ⅷ ٣٤٥",
    "\x00\x01\x7f control",
    "https://example.org/a?b=c&d=%20#frag",
)


def record(settings: dict[str, Any]) -> dict[str, object]:
    import sentencepiece  # type: ignore[import-not-found]

    written = io.BytesIO()
    licence = (REPOSITORY / "LICENSE").read_text("utf-8").splitlines()
    lines = [line for _, text in OWN_TEXTS for line in text.splitlines()] + licence
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()), model_writer=written, vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.99, minloglevel=2, **settings,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(model.get_piece_size())
    user_defined = set(settings.get("user_defined_symbols", ()))

    def kind(index: int) -> TokenType:
        if model.is_unknown(index):
            return TokenType.UNKNOWN
        if model.is_control(index):
            return TokenType.CONTROL
        if model.is_byte(index):
            return TokenType.BYTE
        return TokenType.USER_DEFINED if model.id_to_piece(index) in user_defined else TokenType.NORMAL

    return {
        "space_prefix": settings["add_dummy_prefix"],
        "tokens": [model.id_to_piece(index) for index in ids],
        "scores": [model.get_score(index) for index in ids],
        "types": [kind(index) for index in ids],
        "texts": {text: model.encode(text) for text in TEXTS},
    }


def record_gemma() -> dict[str, list[int]]:
    from transformers import AutoTokenizer

    path = resolve("gemma-3-270m").path
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return {text: theirs.encode(text) for text in (*TEXTS, *GEMMA_TEXTS, *(text for _, text in OWN_TEXTS))}


def main() -> None:
    variants = {name: record(settings) for name, settings in VARIANTS.items()}
    versions = {name: version(name) for name in ("sentencepiece", "transformers")}
    whole = {"versions": versions, "variants": variants, "gemma-3-270m": record_gemma()}
    GOLDEN_PATH.write_text(json.dumps(whole, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
