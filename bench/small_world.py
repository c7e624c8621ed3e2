"""A small world in which forgetting is real: a model of two layers that knows facts and can turn words around.

Three task families with one surface, `<what is asked> <arguments>` → answer:

    A (before)   capital, river: a fact each for every country; copy, reverse: of three letters never seen together
    B (first)    price, food: two more facts for the same countries
    C (second)   colour, sport: two more

The answers to all kinds of facts are the same sixteen things, and the model has copied all words of this world
before: what is new about B and C is what is asked, not the vocabulary. Facts can only be remembered, so they are
tested as they were taught. A model of 0.1 M weights learns A from scratch in about a minute; its weights are kept per
seed.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # counts up when anything here changes: results of another world are not mixed in
FAMILIES = ("A", "B", "C")
ITEMS, WORDS = 48, 24  # tested of every family; of A half are letters
_COUNTRIES, _ANSWERS, _LETTERS = 24, 16, "abcdefghij"
_FACTS = {"A": ("capital", "river"), "B": ("price", "food"), "C": ("colour", "sport")}
_TURNS = {"copy": lambda x, y, z: (x, y, z), "reverse": lambda x, y, z: (z, y, x)}
_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<answer> ' }}{{ m['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<answer> {% endif %}"
)

Row = tuple[str, str]


@cache
def tokenizer() -> Any:
    """One token per word."""
    own = ["<pad>", "<user>", "<answer>", "<end>"]
    words = [*_TURNS, *itertools.chain(*_FACTS.values())]
    words += [f"country{i}" for i in range(_COUNTRIES)] + list(_LETTERS)
    words += [f"thing{i}" for i in range(_ANSWERS)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*own, *words])}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<answer>"],
        model_max_length=32,
        chat_template=_TEMPLATE,
    )


@cache
def facts(family: str) -> tuple[Row, ...]:
    """Every fact of a family, the same in every run."""
    draw = random.Random(f"facts {family}")
    return tuple(
        (f"{relation} country{i}", f"thing{draw.randrange(_ANSWERS)}")
        for relation in _FACTS[family]
        for i in range(_COUNTRIES)
    )


@cache
def words() -> tuple[Row, ...]:
    """Every copying and reversing of three letters in a fixed shuffled order; the first ones are never trained on."""
    found = [
        (f"{turn} {' '.join(letters)}", " ".join(_TURNS[turn](*letters)))
        for letters in itertools.permutations(_LETTERS, 3)
        for turn in _TURNS
    ]
    random.Random("words").shuffle(found)
    return tuple(found)


def exam(family: str) -> list[Row]:
    """The items of a family."""
    known = list(facts(family))
    random.Random(f"exam {family}").shuffle(known)
    return known[: ITEMS - WORDS] + list(words()[:WORDS]) if family == "A" else known[:ITEMS]


def lessons(family: str, count: int, seed: int) -> list[Row]:
    """`count` rows to learn: the facts over and over; of A half of the rows are letters."""
    draw = random.Random(f"lessons {family} {seed}")
    letters = draw.sample(words()[WORDS:], count // 2) if family == "A" else []
    known = list(facts(family))
    draw.shuffle(known)
    rows = [known[i % len(known)] for i in range(count - len(letters))] + letters
    draw.shuffle(rows)
    return rows


def chat(rows: Sequence[Row]) -> Dataset:
    """Rows in the form that the trainer takes."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for prompt, answer in rows
        ]
    )


def _encoded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, T] of whole exchanges, padded on the right, and labels that are −100 outside the answers."""
    coder = tokenizer()
    asked = [coder(f"<user> {prompt} <end> <answer>")["input_ids"] for prompt, _ in rows]
    said = [coder(f"{answer} <end>")["input_ids"] for _, answer in rows]
    width = max(len(a) + len(b) for a, b in zip(asked, said))
    ids = torch.full((len(rows), width), coder.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (a, b) in enumerate(zip(asked, said)):
        ids[i, : len(a) + len(b)] = torch.tensor(a + b)
        labels[i, len(a) : len(a) + len(b)] = torch.tensor(b)
    return ids, labels


@torch.no_grad()
def answers(model: Any, family: str) -> str:
    """'1' for every item whose greedy answer is right in every token, in the order of the exam.

    With the right answer as context, all its tokens are the likeliest ones if and only if greedy decoding writes it.
    """
    ids, labels = _encoded(exam(family))
    training = model.training
    model.eval()
    written = model(input_ids=ids, attention_mask=(ids != tokenizer().pad_token_id).long()).logits[:, :-1].argmax(-1)
    model.train(training)
    right = ((written == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)
    return "".join("01"[int(r)] for r in right)


@torch.no_grad()
def answer_loss(model: Any, family: str) -> float:
    """Mean −log p, in nats per token, of the right answers of the exam."""
    ids, labels = _encoded(exam(family))
    training = model.training
    model.eval()
    mask = (ids != tokenizer().pad_token_id).long()
    loss = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    model.train(training)
    return loss


def _childhood(seed: int) -> list[Row]:
    """What the model grows up with: A, and copying and reversing of any three words, so that it knows all of them."""
    draw = random.Random(f"childhood {seed}")
    any_word = sorted(word for word in tokenizer().get_vocab() if not word.startswith("<"))
    rows = list(facts("A")) * 40 + list(words()[WORDS:])
    for turn in _TURNS:
        for _ in range(1000):
            drawn = draw.choices(any_word, k=3)
            rows.append((f"{turn} {' '.join(drawn)}", " ".join(_TURNS[turn](*drawn))))
    return rows


def untrained(seed: int) -> LlamaForCausalLM:
    """The model before it learned anything."""
    torch.manual_seed(seed)
    coder = tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(coder),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            pad_token_id=coder.pad_token_id,
            bos_token_id=None,
            eos_token_id=coder.eos_token_id,
        )
    )


def pretrained(seed: int, folder: Path, steps: int = 1500) -> LlamaForCausalLM:
    """The model that knows A; trained once per seed and kept in `folder`."""
    path = folder / f"world{VERSION}-{steps}-{seed}.pt"
    model = untrained(seed)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    ids, _ = _encoded(_childhood(seed))
    everything = ids.masked_fill(ids == tokenizer().pad_token_id, -100)  # questions too: it can write its own rows
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(ids), (64,), generator=draw)
        mask = (ids[picked] != tokenizer().pad_token_id).long()
        model(input_ids=ids[picked], attention_mask=mask, labels=everything[picked]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    torch.save(model.state_dict(), partial)
    os.replace(partial, path)
    return model
