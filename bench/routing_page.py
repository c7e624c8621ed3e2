"""The page docs/routing.md: what was asked, how, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retain.experts.routing.opening import DEFAULT

_TEXT = """# Which expert answers

Written by `python bench/routing.py --data DATA`, on {machine},
with {model} ({numbers}) as the base.

Six domains, {fit} example questions each, are learnt by every router, with {nobody} questions for nobody: some of the
core suite, and half of the built-in everyday requests in English and Chinese. It is then asked {domains} other
questions of the domains, and {core} other questions of the core suite, which are for nobody: the base answers them.

- arithmetic: nine families of `reasoning_gym`; idioms and poetry: Chinese (`chinese_idioms`, `chinese_poetry`);
  history: `trivia_history`; medicine: `medmcqa`; encyclopaedia: `cl_benchmark/dbpedia`. The question alone is asked,
  without the choices of a multiple-choice question.
- Fitted on the first rows of each training file, asked the last of each test file. The kinds of router, their settings
  and the share of the layers were chosen on the first 100 test rows and on another draw of the core suite; of
  arithmetic, whose test file has 135 rows, some questions were seen in both.

{table}

- **experts' questions**: the share for which the right expert was chosen. **core**: the share that went to the base.
  **together**: all of both, with its 95 % interval (Wilson).
- **AUROC**: how well the likeliest expert's chance tells experts' questions from the core suite's: 0.5 not at all, 1
  always.
- **sure**: the mean confidence, which should be near **together**.
- **time**: of one choice, median of {timed} questions asked one at a time, explanation included; **of the answer**: all
  choices against all answers of {tokens} tokens by the base (`generate`), taken in turn. Other programs used
  {others:.0%} of the machine meanwhile, which lengthens both.

The default is `{default}`{verdict}.
`keyword` needs no model: it is what to take where none is at hand. {likelihood}

## By domain

{each}

## Without templates

Four of the sets put a template around every question: all idioms are asked as 成语“…”是什么意思？, and a router may
learn that alone. *Without*: fitted and asked with the bare idiom, verses, formula or paragraph. *Taken off when asked*:
fitted with the templates, asked without. That is what no kind of router survives: an idiom alone is then Chinese of no
known form. **Examples must look like the questions that will be asked**; give some of each form.

{bare}

## Questions of other kinds, for nobody

*Everyday*: the other half of the built-in everyday requests. *Elsewhere*: {elsewhere} instructions of `dolly`, of a
kind that no router was fitted with. Some ask what a domain is about ("Who was …?"), so 100 % would not be right; still,
what is far from every question it knows is where a router is weakest. `--others FILE` with questions of your own for
nobody is the remedy.

{kinds}

*Core without {near}*: the core suite has sums, and dates of history; a person might give these
to the experts.

## How much of the base is read

`{default}` with hidden states of the base after so many of its layers; {layers} are read. The time of reading grows
with them; most differences are smaller than the intervals. Asked on the first test rows, on which this was chosen.

{depths}
"""

_NOT_MEASURED = """`likelihood` was not measured here: it needs trained
experts, and reads a question once with each of them and once with the base."""
_MEASURED = """`likelihood` needs trained
experts, and reads a question once with each of them and once with the base. Here they are LoRA adapters of rank {rank},
trained for {steps} steps of {batch} rows on the training file of their domain, questions included: an expert that
learned answers alone says less about questions.{apart}"""
_APART = """ It was timed by itself, beside answers of its own,
while other programs used {others:.0%} of the machine."""


def page(results: Mapping[str, Any]) -> str:
    """The whole page from the numbers of `bench/routing.py`."""
    routers, sizes, seconds = results["routers"], results["sizes"], results["seconds"]
    given = {name: one["given"] for name, one in routers.items()}
    best = given[DEFAULT]
    met = best["all"][0] >= 0.95 and _of_answer(seconds, DEFAULT) < 0.10
    alone = seconds.get("likelihood", {})
    apart = _APART.format(others=alone["others"]) if "others" in alone else ""
    return _TEXT.format(
        **results["about"],
        **{key: sizes[key] for key in ("fit", "nobody", "timed", "tokens", "layers")},
        domains=best["domains"][3],
        core=best["core"][3],
        elsewhere=best["elsewhere"][3],
        default=DEFAULT,
        verdict=", which meets the aims: 95 % right together, and less than 10 % of the answer's time" if met else "",
        others=seconds["others"],
        likelihood=_MEASURED.format(**sizes, apart=apart) if "likelihood" in routers else _NOT_MEASURED,
        near=" and ".join(sizes["near"]),
        table=_table(
            ("router", "experts' questions", "core", "together", "AUROC", "sure", "time", "of the answer"),
            [
                (
                    _named(name),
                    *(_share(one[key]) for key in ("domains", "core")),
                    _with_ends(one["all"]),
                    f"{one['auroc']:.3f}",
                    f"{one['confidence']:.1%}",
                    f"{1000 * seconds[name]['median']:.0f} ms",
                    f"{_of_answer(seconds, name):.1%}",
                )
                for name, one in given.items()
            ],
        ),
        each=_table(
            ("router", *best["each"]), [(_named(n), *map(_with_ends, one["each"].values())) for n, one in given.items()]
        ),
        bare=_table(
            ("router", "as given", "without", "taken off when asked"),
            [
                (_named(n), *(_with_ends(one[form]["all"]) for form in ("given", "without", "taken off when asked")))
                for n, one in routers.items()
                if "without" in one  # the experts would have to be trained without templates, too
            ],
        ),
        kinds=_table(
            ("router", f"core without {' and '.join(sizes['near'])}", "everyday", "elsewhere", "AUROC, elsewhere"),
            [
                (
                    _named(n),
                    *(_with_ends(one[k]) for k in ("apart", "everyday", "elsewhere")),
                    f"{one['auroc_elsewhere']:.3f}",
                )
                for n, one in given.items()
            ],
        ),
        depths=_table(
            ("layers", "experts' questions", "core", "together", "AUROC"),
            [
                (n, *(_share(one[k]) for k in ("domains", "core")), _with_ends(one["all"]), f"{one['auroc']:.3f}")
                for n, one in results["depths"].items()
            ],
        ),
    )


def _named(router: str) -> str:
    return f"**`{router}`**" if router == DEFAULT else f"`{router}`"


def _of_answer(seconds: Mapping[str, Any], router: str) -> float:
    return seconds[router]["sum"] / seconds[router].get("answer", seconds["answer"]["sum"])


def _share(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1%}"


def _with_ends(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1%} ({100 * interval[1]:.1f}–{100 * interval[2]:.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
