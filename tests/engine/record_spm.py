"""`python -m tests.engine.record_spm` trains small vocabularies with SentencePiece itself and writes spm_golden.json.

It needs the PyPI package `sentencepiece` (0.2.3 wrote the present file), which nothing else does: tests read the file.
"""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.models.gguf_vocabulary import TokenType
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


def main() -> None:
    variants = {name: record(settings) for name, settings in VARIANTS.items()}
    whole = {"sentencepiece": version("sentencepiece"), "variants": variants}
    GOLDEN_PATH.write_text(json.dumps(whole, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
