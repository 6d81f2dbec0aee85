"""Real prompts of 5 to 1,500 tokens of the default model, the same ones in the same order wherever they are asked for.

1. Texts come from Spec-Bench, HumanEval and GSM8K where their files lie beside the checkout (DATA); without them from
   this project's own texts below and its licence. `source()` says which.
2. Every text is a candidate twice, plain and as a chat. For each length of a logarithmic scale the candidate of the
   kind used least so far is taken; a longer plain text is cut where none has about that length.
3. Every second length between 90 and 700 is a multiple of 32, so that these prompts can be found in the prefix cache
   to their last token.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engine.models.loader import load_config
from engine.models.store import ModelFiles, resolve
from engine.models.tokenizer import Tokenizer, load_tokenizer

MODEL = "smollm2-135m-instruct"
REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "prompts"
NUM_PROMPTS = 40
SHORTEST, LONGEST = 5, 1500  # tokens
WHOLE_BLOCKS = 32  # a multiple of every block size that the tests use
TOLERANCE = 0.02  # of the wanted length


@dataclass(frozen=True, slots=True)
class OraclePrompt:
    kind: str  # where its text comes from
    is_chat: bool  # in the model's chat template
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.ids)

    def __str__(self) -> str:
        return f"{self.kind}{' chat' if self.is_chat else ''} of {len(self.ids)} tokens ({self.digest[:8]})"


def digest_of(ids: Iterable[int]) -> str:
    """Names a prompt: SHA-256 of its token ids as little-endian 32-bit words."""
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()


def oracle_prompts(count: int) -> tuple[OraclePrompt, ...]:
    """`count` of the 40 prompts, shortest to longest, spread over their lengths."""
    return _spread(_choose(_candidates(data_texts() if has_data() else own_texts())), count)


def own_prompts(count: int) -> tuple[OraclePrompt, ...]:
    """The same from this project's own texts alone: what a checkout without the data sets gets."""
    return _spread(_choose(_candidates(own_texts())), count)


def has_data() -> bool:
    return (DATA / "spec-bench" / "question.jsonl").is_file()


def source() -> str:
    return "Spec-Bench, HumanEval and GSM8K" if has_data() else "own texts and the licence (the data sets are absent)"


@cache
def model_files() -> ModelFiles:
    return resolve(MODEL)


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(model_files(), load_config(model_files()))


# --- choosing -------------------------------------------------------------------------------------------------


def _spread(prompts: tuple[OraclePrompt, ...], count: int) -> tuple[OraclePrompt, ...]:
    assert 2 <= count <= len(prompts), f"there are {len(prompts)} prompts"
    last = len(prompts) - 1
    return tuple(prompts[round(index * last / (count - 1))] for index in range(count))


def _wanted_lengths() -> Iterator[int]:
    for index in range(NUM_PROMPTS):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** (index / (NUM_PROMPTS - 1)))
        whole = index % 2 == 0 and 90 < length < 700
        yield round(length / WHOLE_BLOCKS) * WHOLE_BLOCKS if whole else length


@cache
def _choose(candidates: tuple[OraclePrompt, ...]) -> tuple[OraclePrompt, ...]:
    used: Counter[tuple[str, bool]] = Counter()
    chosen: list[OraclePrompt] = []
    for length in _wanted_lengths():
        slack = 0 if length % WHOLE_BLOCKS == 0 or length == LONGEST else int(TOLERANCE * length)
        taken = [prompt.ids for prompt in chosen]
        near = [one for one in candidates if abs(len(one.ids) - length) <= slack and one.ids not in taken]
        near = near or [_cut(one, length) for one in candidates if not one.is_chat and len(one.ids) > length]
        best = min(near, key=lambda one: (used[one.kind, one.is_chat], abs(len(one.ids) - length)))
        used[best.kind, best.is_chat] += 1
        chosen.append(best)
    return tuple(chosen)


def _cut(prompt: OraclePrompt, length: int) -> OraclePrompt:
    return OraclePrompt(prompt.kind, prompt.is_chat, prompt.ids[:length])


@cache
def _candidates(texts: tuple[tuple[str, str], ...]) -> tuple[OraclePrompt, ...]:
    """texts: (kind, text). All plain ones, then all as chats."""
    plain = [OraclePrompt(kind, False, tuple(tokenizer().encode(text))) for kind, text in texts]
    chats = [OraclePrompt(kind, True, tuple(_chat_ids(text))) for kind, text in texts]
    return tuple(one for one in (*plain, *chats) if one.ids)


def _chat_ids(text: str) -> list[int]:
    return tokenizer().encode(tokenizer().render_chat([{"role": "user", "content": text}]), add_special=False)


# --- texts ----------------------------------------------------------------------------------------------------


@cache
def data_texts() -> tuple[tuple[str, str], ...]:
    questions = [json.loads(line) for line in (DATA / "spec-bench" / "question.jsonl").read_text("utf-8").splitlines()]
    with gzip.open(DATA / "human-eval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        programs = [json.loads(line)["prompt"] for line in file]
    sums = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()]
    return (
        *((f"spec-bench/{question['category']}", question["turns"][0]) for question in questions),
        *(("human-eval", program) for program in programs),
        *(("gsm8k", one["question"]) for one in sums),
    )


@cache
def own_texts() -> tuple[tuple[str, str], ...]:
    """(kind, text): our short ones, and runs of 1, 2, 4, ... paragraphs of the licence from every third one on."""
    licence = (REPOSITORY / "LICENSE").read_text("utf-8").split("\n\n")
    runs = [
        "\n\n".join(licence[first : first + count])
        for first in range(0, len(licence), 3)
        for count in (1, 2, 4, 8, 16, 32, 64)
        if first + count <= len(licence)
    ]
    return (*OWN_TEXTS, ("licence", "\n\n".join(licence)), *(("licence", run) for run in dict.fromkeys(runs)))


OWN_TEXTS = (
    ("question", "What is a steelyard, and who used it first?"),
    ("question", "Name the largest lake of every continent, one on each line, and say how deep it is."),
    ("question", "My sourdough bread comes out flat. List the five likeliest reasons, and what to change for each."),
    (
        "sum",
        "A balance has arms of 4 cm and 60 cm. Which counterweight on the long arm balances 15 kg on the short one?",
    ),
    (
        "sum",
        "A mill grinds 120 sacks in 8 hours with three stones. One stone breaks after two hours. How many hours does "
        "the whole job of 180 sacks take, if nothing else goes wrong and nobody repairs the stone?",
    ),
    ("translation", "Übersetze ins Englische: Der Müller wog das Mehl auf der Schnellwaage, bevor er es verkaufte."),
    ("translation", "Translate into French: The counterweight slides along the beam until the two sides are even. ⚖️"),
    ("code", 'def median(values: list[float]) -> float:\n    """The middle value; of two middle ones the mean."""\n'),
    (
        "code",
        "class Ring:\n    def __init__(self, size):\n        self.items = [None] * size\n        self.start = 0\n"
        "        self.count = 0\n\n    def push(self, item):\n        if self.count == len(self.items):\n"
        "            raise IndexError('the ring is full')\n"
        "        self.items[(self.start + self.count) % len(self.items)] = item\n        self.count += 1\n\n"
        "    def pop(self):\n",
    ),
    (
        "story",
        "The harbour master kept his scales in a locked shed, because twice that winter someone had filed a notch into "
        "the beam. On the first morning of the herring season he found the door open. Nothing was missing. The "
        "counterweight, however, hung one hook further out than he had left it, and in the pan lay",
    ),
    (
        "story",
        "Once there was a clock that ran a minute fast every day and was proud of it. The other clocks in the shop",
    ),
    (
        "list",
        "Things to bring to the market stall on Saturday:\n1. the small scales, oiled\n2. change: 40 coins of each\n"
        "3. paper bags, two sizes\n4. chalk and the price board\n5.",
    ),
)
