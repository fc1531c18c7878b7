"""Make a tiny base, three experts with different skills, and their data, from nothing but a seed.

    python configs/quickstart/make_models.py [DEST]          (DEST: the folder `build` beside this script)

The skills, each on six-letter words or four-digit numbers, with a prompt of its own so that one model can hold all:

    math     "math: 4123+1111 = "   ->  "5234"        addition, with carries
    words    "words: tarimo = "     ->  "omirat"      the word backwards
    cipher   "cipher: tarimo = "    ->  "vesonu"      every letter by the next vowel or consonant

The base reads careless text: more often than not, a character of an answer is the one at that place of the question. So
it has seen every skill and shows none of them well. Each expert is the base fine-tuned on careful text of one skill.
Every expert therefore is a small step from the base that changes one habit, which is what makes experts mergeable.
"""

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"
NEXT_LETTER = str.maketrans(VOWELS + CONSONANTS, VOWELS[1:] + VOWELS[:1] + CONSONANTS[1:] + CONSONANTS[:1])
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|pad|>"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

SEED = 0
TRAIN_ROWS, TEST_ROWS = 2000, 200  # of each skill; no model is trained on a test row
CARELESSNESS = 0.6  # how often a character of the base's text is the careless one
BATCH = 64
BASE_STEPS, BASE_RATE = 400, 4e-3
EXPERT_STEPS, EXPERT_RATE = 40, 1e-3


class Row(NamedTuple):
    """One question of a skill, its answer, and the careless answer, which has as many characters."""

    prompt: str
    completion: str
    careless: str


def number(rng: random.Random) -> str:
    """A number of four digits, small enough that adding 1111 leaves it at four."""
    return str(rng.randint(1000, 8888))


def word(rng: random.Random) -> str:
    """A made-up word of three syllables, six letters."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))


class Skill(NamedTuple):
    """How to draw a subject, ask about it and answer."""

    subject: Callable[[random.Random], str]
    prompt: str
    answer: Callable[[str], str]


SKILLS = {
    "math": Skill(number, "math: {}+1111 = ", lambda number: str(int(number) + 1111)),
    "words": Skill(word, "words: {} = ", lambda word: word[::-1]),
    "cipher": Skill(word, "cipher: {} = ", lambda word: word.translate(NEXT_LETTER)),
}


def make_rows(skill: str, train: int, test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a skill, all different from each other."""
    rng = random.Random(f"{skill} {seed}")
    draw, prompt, answer = SKILLS[skill]
    subjects: dict[str, None] = {}  # a set that keeps its order
    while len(subjects) < train + test:
        subjects[draw(rng)] = None
    rows = [Row(prompt.format(subject), answer(subject), subject) for subject in subjects]
    return rows[:train], rows[train:]


def careless_row(row: Row, carelessness: float, rng: random.Random) -> Row:
    """The row with each character of the answer replaced by the careless one with probability `carelessness`."""
    pairs = zip(row.completion, row.careless, strict=True)
    return row._replace(completion="".join(bad if rng.random() < carelessness else good for good, bad in pairs))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte, so any text goes through it unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, float32, the embedding tied to the head."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    # The usual initializer_range, 0.02, is made for wide models; near 1/sqrt(hidden_size) this one learns far sooner.
    config = {"initializer_range": 0.1, "max_position_embeddings": 128, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **config, **tokens))
    model.generation_config = GenerationConfig(max_new_tokens=16, do_sample=False, **tokens)
    return model


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], steps: int, rate: float
) -> None:
    """Train in place on the tokens of the answers and the end token: AdamW, ten steps of warm-up, linear decay."""
    prompts = [len(ids) for ids in tokenizer([row.prompt for row in rows])["input_ids"]]
    texts = [row.prompt + row.completion + tokenizer.eos_token for row in rows]
    ids_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    positions_T = torch.arange(ids_BT.shape[1])
    answer_BT = (positions_T >= torch.tensor(prompts)[:, None]) & (ids_BT != tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    factors = [min((step + 1) / 10, max(0.05, 1 - step / steps)) for step in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (BATCH,))
        ids, answer = ids_BT[chosen], answer_BT[chosen, 1:]
        # Padding is on the right and attention looks to the left only, so no mask is needed; and logits are taken
        # where an answer is expected only.
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][answer]
        loss = cross_entropy(model.lm_head(hidden), ids[:, 1:][answer])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def write_rows(rows: list[Row], path: Path) -> None:
    """Write rows as JSON lines {prompt, completion}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def make(dest: Path) -> None:
    """Make data, base and experts in the folder `dest` and print a line for each model."""
    data = {skill: make_rows(skill, TRAIN_ROWS, TEST_ROWS, SEED) for skill in SKILLS}
    for skill, (train_rows, test_rows) in data.items():
        write_rows(train_rows, dest / "data" / skill / "train.jsonl")
        write_rows(test_rows, dest / "data" / skill / "test.jsonl")

    # One thread: a second gains little on matrices this small, and sums do not depend on the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    disable_progress_bar()
    tokenizer = make_tokenizer()

    def trained(model: LlamaForCausalLM, rows: list[Row], steps: int, rate: float, folder: str) -> LlamaForCausalLM:
        start = time.perf_counter()
        train(model, tokenizer, rows, steps, rate)
        model.save_pretrained(dest / folder)
        tokenizer.save_pretrained(dest / folder)
        print(f"{folder:16} {steps:4} steps {time.perf_counter() - start:5.1f} s", flush=True)
        return model

    rng = random.Random(SEED)
    careless = [careless_row(row, CARELESSNESS, rng) for rows, _ in data.values() for row in rows for _ in range(4)]
    base = trained(make_model(tokenizer), careless, BASE_STEPS, BASE_RATE, "base")
    for skill, (train_rows, _) in data.items():
        trained(deepcopy(base), train_rows, EXPERT_STEPS, EXPERT_RATE, f"experts/{skill}")


def main(dest: Path) -> None:
    """Make everything in `dest` unless this very script did so before; a run that is killed leaves `dest` as it was."""
    script = Path(__file__)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    settings = json.dumps({"made_by": script.name, "sha256": digest, "torch": torch.__version__}, indent=2) + "\n"
    finished = dest / "settings.json"
    found = finished.read_text() if finished.is_file() else ""
    if found == settings:
        print(f"{dest} is up to date")
        return
    if dest.exists() and script.name not in found and any(dest.iterdir()):
        sys.exit(f"{dest}: holds files that {script.name} did not make; name another folder or empty this one")
    making = dest.with_name(dest.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    make(making)
    (making / finished.name).write_text(settings)
    if dest.exists():
        shutil.rmtree(dest)
    making.rename(dest)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(__file__).resolve().parent / "build")
