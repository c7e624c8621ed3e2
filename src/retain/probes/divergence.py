"""How far the next-token distribution is from the base's, on contexts that never change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.errors import DataError
from retain.models import base_outputs
from retain.models.base_outputs import Context, Said
from retain.models.generation import encode_prompts, generate
from retain.models.likelihood import context_length, encode, prefix_token
from retain.probes.asking import shown_to
from retain.probes.base import Item, Outcome, Probe, Progress, Subject


class Divergence(Probe):
    """Field `text`, or `prompt`, in a row that says `kind: divergence`. Score: Σ_t KL(p⁰‖p) in nats, weight: tokens.

    Forward KL from the base p⁰ to the model p, over all next tokens, at every position of a fixed context: of a text
    all its tokens; of a prompt the answer that the *base* wrote to it, greedily. Contexts are the same at every stage,
    never what the model itself writes, and the KL is that of the two distributions, never a ratio of likelihoods of
    given labels. The score of the probe is Σ scores / Σ tokens, in nats per token; that of the base is 0.

    What the base said is kept in the run directory, the `top_k` likeliest tokens of each position and the mass of all
    others; the score is then a lower bound of the full divergence (`models.base_outputs`), exact where `top_k` is the
    vocabulary. Details hold the mass outside the list (`tail`, the base's), whether the score is `exact`, the largest
    divergence of a token, and `same_token`: the share of positions where both models have the same likeliest token.
    A run that keeps no text asks the base anew at every stage.

    Options, for the probe or in an item:
        top_k: likeliest tokens that are kept (128).
        max_tokens: most tokens of the base's answer to a prompt (32).
        window: most tokens of a text, which is cut at the end (512), and at most the model's context.
    """

    kind = "divergence"
    metric = "KL"
    group = "behaviour"
    higher_is_better = False
    fewest = 2
    fields = frozenset()  # never told by its fields: a row with `text` alone is one of perplexity
    settings = frozenset({"top_k", "max_tokens", "window"})

    _DEFAULTS = {"top_k": 128, "max_tokens": 32, "window": 512}

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        for item in self.items:
            where = f"probe '{name}', item '{item.id}'"
            given = [key for key in ("text", "prompt") if key in item.fields]
            if len(given) != 1 or not isinstance(item.fields[given[0]], str) or not item.fields[given[0]].strip():
                raise DataError(f"{where}: {', '.join(given) or 'neither'} given; allowed is a text or a prompt.")
            for option in self._DEFAULTS:
                value = self._option(item, option)
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise DataError(f"{where}, {option}: {value!r} given; allowed is a number from 1 on.")
        if len(kept := {self._option(item, "top_k") for item in self.items}) > 1:
            raise DataError(f"probe '{name}', top_k: {sorted(kept)} given; allowed is one number for all items.")

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Compare with the base in every context; outcomes in the order of `self.items`."""
        said = self._said(subject)
        outcomes: dict[int, Outcome] = {}
        for place, gap in base_outputs.compare(subject.model, subject.tokenizer, said, subject.batch_tokens):
            item, one = self.items[place], said[place]
            context = one.context
            details = {
                "exact": gap.exact,
                "tail": 0.0 if gap.exact else one.tail,
                "largest": gap.largest,
                "same_token": gap.same,
            }
            reference = ""
            if "prompt" in item.fields:
                reference = subject.tokenizer.decode(context.tokens[context.first :], skip_special_tokens=True).strip()
            shown, tokens = item.fields.get("text", item.fields.get("prompt", "")), len(one.ids)
            outcomes[place] = Outcome(item.id, shown, reference, "", gap.nats, None, tokens, details)
            progress(1)
        return [outcomes[place] for place in range(len(self.items))]

    def limit(self, item: Item) -> int:
        """Most tokens that are compared: of a text, or of the base's answer to a prompt."""
        return int(self._option(item, "window" if "text" in item.fields else "max_tokens"))

    def _said(self, subject: Subject) -> list[Said]:
        """What the base said to every item: kept earlier, or found out now."""
        origin = subject.origin
        if origin is None:
            raise DataError(
                f"probe '{self.name}': a divergence is from a base, and this model was given without one. Give the "
                "directory of a run, which knows its base."
            )
        names = [self._digest(item) for item in self.items]
        path = None if origin.folder is None else origin.folder / self._file()
        kept = base_outputs.load(path) if path is not None and path.is_file() else {}
        if any(name not in kept for name in names):
            base = origin.load()
            kept = dict(zip(names, self._ask(base, subject)))
            if path is not None and origin.keep:
                base_outputs.save(kept, path)
        return [kept[name] for name in names]

    def _ask(self, base: Any, subject: Subject) -> Sequence[Said]:
        tokenizer, room = subject.tokenizer, context_length(base, subject.tokenizer)
        contexts: dict[int, Context] = {}
        asked = [place for place, item in enumerate(self.items) if "prompt" in item.fields]
        for place, item in enumerate(self.items):
            if "text" in item.fields:
                (tokens,) = encode(tokenizer, [item.fields["text"]])
                tokens = tokens[1:] if tokens[:1] == [tokenizer.bos_token_id] else tokens
                window = min(self.limit(item), room)
                contexts[place] = Context([prefix_token(tokenizer), *tokens[:window]], 1)
        prompts, _ = shown_to(subject, [self.items[place] for place in asked])
        limits = [self.limit(self.items[place]) for place in asked]
        answers = generate(base, tokenizer, prompts, limits, batch_tokens=subject.batch_tokens)
        for place, ids, answer in zip(asked, encode_prompts(tokenizer, prompts), answers):
            shown = ids[answer.truncated :]
            contexts[place] = Context([*shown, *answer.ids], len(shown))
        ordered = [contexts[place] for place in range(len(self.items))]
        k = self._option(self.items[0], "top_k")
        return base_outputs.say(base, tokenizer, ordered, k, subject.batch_tokens)

    def _option(self, item: Item, name: str) -> Any:
        return item.fields.get(name) or self.options.get(name) or self._DEFAULTS[name]

    def _digest(self, item: Item) -> str:
        """By which the record of an item is known again: all that its context depends on, apart from the base."""
        options = {name: self._option(item, name) for name in self._DEFAULTS}
        text = json.dumps([item.fields, options], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

    def _file(self) -> Path:
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.name)
        return Path(f"{plain}-{hashlib.sha256(self.name.encode('utf-8')).hexdigest()[:6]}.safetensors")
