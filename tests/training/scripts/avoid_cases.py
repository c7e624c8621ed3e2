"""Rows written on two processes, of which the main one alone knows the probes' items. Argument: the shared folder."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from tiny import tiny_model, tiny_tokenizer

from retain.data.leaks import texts_of
from retain.methods.context import Run
from retain.models import generation
from retain.models.generation import Generated

FIRST, LATER = "few visitors bought any postcards", "every student brought a lamp along"


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    made = []

    def speak(model, tokenizer, prompts, *rest):
        made.append(len(prompts))
        words = [FIRST, LATER, *(f"{a} {b} for {a * 3} or {b * 2}" for a in "abcdef" for b in "klmn")]
        return [Generated(" " + words[(len(made) + i) % len(words)], 6, True) for i in range(len(prompts))]

    generation.generate = speak
    for index, avoid in enumerate(([FIRST], [FIRST, LATER], [FIRST, LATER]), 1):
        known = avoid if state.is_main_process else ()
        run = Run(folder / str(index), shared=folder, tokenizer=tiny_tokenizer(), avoid=known, say=lambda line: None)
        rows = run.old_rows(tiny_model(run.tokenizer), 12)
        found = {"rows": [texts_of(row) for row in rows], "calls": len(made)}
        (folder / f"{index}-{state.process_index}.json").write_text(json.dumps(found))
        state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
