"""Two small new jobs for the demo, written for this project: support tickets to queues, orders to lines.

Both are short, strict formats that a chat model has never seen. Learning them plainly teaches a small model to
answer everything in them, which is what the demo shows. Rows are made from phrases by a seeded generator, and
a prompt is never in both train and test.
"""

from __future__ import annotations

import random

_TICKETS = {
    "DELIVERY": [
        "my parcel has not arrived",
        "the courier left the {thing} at the wrong house",
        "tracking has not moved for {days} days",
        "the {thing} was shipped to my old address",
        "I was promised the {thing} {days} days ago",
    ],
    "BILLING": [
        "I was charged twice for the {thing}",
        "the invoice for the {thing} shows the wrong amount",
        "you took money for {days} days I did not use",
        "my discount for the {thing} is missing from the bill",
        "please send me a receipt for the {thing}",
    ],
    "FAULT": [
        "the {thing} stopped working after {days} days",
        "the {thing} makes a loud noise",
        "the {thing} does not turn on any more",
        "a part of the {thing} is broken",
        "the screen of the {thing} stays black",
    ],
}
_THINGS = ["lamp", "kettle", "printer", "jacket", "radio", "tablet", "drill", "camera", "heater", "headset"]
_TAILS = [
    *("This is urgent!", "I need an answer today.", "Please act immediately."),
    *("No hurry.", "Take your time.", "Thanks in advance."),
]

_DRINKS = ["coffee", "tea", "juice", "cocoa", "lemonade", "water"]
_FOODS = ["bagel", "muffin", "salad", "soup", "toast", "pancake"]
_SIZES = {"small": "S", "medium": "M", "large": "L"}
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_ORDERS = ["I would like {}.", "Can I get {}?", "{}, please.", "We will take {}.", "Could you bring us {}?"]


def _ticket(draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(sorted(_TICKETS))
    said = draw.choice(_TICKETS[kind]).format(thing=draw.choice(_THINGS), days=draw.randint(2, 9))
    tail = " " + draw.choice(_TAILS) if draw.random() < 2 / 3 else ""
    return f"{said[0].upper()}{said[1:]}.{tail}", f"queue={kind}"


def _order(draw: random.Random) -> tuple[str, str]:
    said, lines = [], []
    for names in draw.sample([_DRINKS, _FOODS], k=2):
        word, size = draw.choice(sorted(_COUNTS)), draw.choice(sorted(_SIZES))
        name = draw.choice(names)
        said.append(f"{word} {size} {name}" + ("s" if _COUNTS[word] > 1 else ""))
        lines.append(f"{_COUNTS[word]}x {name} {_SIZES[size]}")
    text = draw.choice(_ORDERS).format(" and ".join(said))
    return text[0].upper() + text[1:], "; ".join(lines)


_MAKERS = {"tickets": _ticket, "orders": _order}
NAMES = tuple(_MAKERS)


def rows(name: str, train: int, test: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test) rows of one of `NAMES`, as prompt/response; all prompts differ.

    The test rows are the same for every `seed` and `train`, so that runs can be compared item by item. There are about
    1,900 different tickets: no more rows can be had.
    """
    chosen: dict[str, str] = {}
    draw = random.Random(f"{name} test")
    while len(chosen) < test:
        prompt, response = _MAKERS[name](draw)
        chosen.setdefault(prompt, response)
    held_out = list(chosen.items())
    draw = random.Random(f"{name} train {seed}")
    while len(chosen) < test + train:
        prompt, response = _MAKERS[name](draw)
        chosen.setdefault(prompt, response)
    learned = list(chosen.items())[test:]
    pack = [[{"prompt": p, "response": r} for p, r in part] for part in (learned, held_out)]
    return pack[0], pack[1]
