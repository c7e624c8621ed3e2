"""Rows into the form that the trainer reads: chat turns, or plain text.

Four forms of rows are recognised by their columns: `messages`; `prompt` and `response`; `question`, `choices`
and `answer`; `text`. Everything else about a row is left behind, so that rows of
different origin can be mixed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from retain.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: Which tokens are trained on: the response alone, every assistant turn, or everything.
On = Literal["completion", "assistant", "all"]
#: Form → the columns that make it; the first that fits is taken.
FORMS = {
    "messages": ("messages",),
    "response": ("prompt", "response"),
    "choices": ("question", "choices", "answer"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def row_form(columns: Sequence[str], where: str) -> str:
    """The form of rows with these columns: `messages`, `response`, `choices` or `text`.

    Raises:
        DataError: none of the forms, with the columns that were found.
    """
    for form, needed in FORMS.items():
        if set(needed) <= set(columns):
            return form
    allowed = ", ".join("/".join(names) for names in FORMS.values())
    raise DataError(
        f"{where}: columns {', '.join(columns) or '(none)'} are no known form of rows. Allowed: {allowed}. "
        'Name yours with columns, such as {"prompt": "instruction"}.'
    )


def to_chat(
    rows: Dataset | IterableDataset, where: str, on: On = "completion", list_choices: bool = True
) -> Dataset | IterableDataset:
    """Rows in one of TRL's forms, checked row by row.

    Args:
        rows: rows as read by `load_rows`.
        where: the file, for messages.
        on: "completion" gives `prompt` (turns up to the last assistant turn) and `completion` (that turn);
            "assistant" and "all" give `messages`. Text rows give `text` whatever is asked.
        list_choices: show the choices of a multiple-choice question under it, one a line, each after "- ".

    Returns:
        Rows with exactly these columns; a stream stays a stream, and is checked as it is read.

    Raises:
        ConfigError: `on` is none of the three.
        DataError: unknown form, or a row that cannot be trained on, with its number.
    """
    from retain.data.json_rows import quiet

    if on not in ("completion", "assistant", "all"):
        raise ConfigError(f"on: unknown '{on}'. Allowed: all, assistant, completion.")
    columns = rows.column_names or list(next(iter(rows), {}))
    form = row_form(columns, where)
    convert = functools.partial(_convert, form=form, where=where, on=on, list_choices=list_choices)
    with quiet():
        return rows.map(convert, with_indices=True, remove_columns=columns)


def turns(row: dict[str, Any], form: str, where: str = "row", list_choices: bool = True) -> list[dict[str, Any]]:
    """The chat turns of one row of any form but `text`.

    Raises:
        DataError: the row cannot be used.
    """
    if form == "messages":
        return _messages(row["messages"], where)
    if form == "response":
        question, answer = row["prompt"], row["response"]
    else:
        choices = _choices(row["choices"], where)
        question = _text(row["question"], f"{where}: 'question'")
        answer = choices[choice_index(row["answer"], choices, where)]
        if list_choices:
            question = with_choices(question, choices)
    return [
        {"role": "user", "content": _text(question, f"{where}: 'prompt'")},
        {"role": "assistant", "content": _text(answer, f"{where}: 'response'")},
    ]


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question with its choices listed under it."""
    return "\n".join([question, *(f"- {choice}" for choice in choices)])


def choice_index(answer: Any, choices: Sequence[str], where: str = "row") -> int:
    """Which choice is right: a 0-based index, a choice's text, or a letter (A is the first).

    A text that can be read in two ways that disagree ("1" among the choices 1, 2, 3) is refused rather than
    guessed; whole numbers are always indices.

    Raises:
        DataError: out of range, no choice, or ambiguous.
    """
    allowed = f"Allowed: 0 to {len(choices) - 1}, A to {LETTERS[min(len(choices), 26) - 1]}, or a choice's text"
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise DataError(f"{where}: answer {answer} is out of range for {len(choices)} choices. {allowed}.")
        return answer
    if not isinstance(answer, str):
        raise DataError(f"{where}: answer is {_given(answer)}. {allowed}.")
    word = answer.strip()
    readings = {index for index, choice in enumerate(choices) if choice.strip() == word}
    if len(word.strip("().")) == 1 and word.strip("().").upper() in LETTERS:
        readings.add(LETTERS.index(word.strip("().").upper()))
    if word.isascii() and word.isdigit():
        readings.add(int(word))
    readings = {index for index in readings if index < len(choices)}
    if not readings:
        raise DataError(f"{where}: answer {_given(answer)} is none of the choices. {allowed}.")
    if len(readings) > 1:
        raise DataError(
            f"{where}: answer {_given(answer)} can mean choice {' or '.join(map(str, sorted(readings)))}. "
            "Give the 0-based index as a number."
        )
    return readings.pop()


def prompt_text(row: dict[str, Any], form: str) -> str:
    """What identifies a row's question, in one spelling: case-folded, white space as one space.

    Used to keep train and test apart; for a multiple-choice question the choices belong to it, for chats
    everything before the last turn, for text the text.
    """
    if form == "messages":
        content = "\n".join(str(turn.get("content")) for turn in list(row["messages"] or [])[:-1])
    elif form == "choices":
        content = "\n".join([str(row["question"]), *sorted(map(str, row["choices"] or []))])
    else:
        content = str(row["prompt" if form == "response" else "text"])
    return " ".join(content.casefold().split())


# -------------------------------------------------------------------------------------- templates and lengths


def template_check(tokenizer: Any, on: On = "completion", chat: bool = True) -> str | None:
    """Check that the tokenizer can render rows, and give the template to train with if it is another one.

    Args:
        tokenizer: the model's tokenizer.
        on: as in `to_chat`. "assistant" needs a template that marks what the assistant says
            (`{% generation %}`); for widely used templates TRL has a marked twin, which is returned.
        chat: whether there are chat rows at all; text rows need no template.

    Returns:
        A chat template to train with, or None when the tokenizer's own will do.

    Raises:
        ModelError: no template, or none that gives the masks, with what to do.
    """
    if not chat:
        return None
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{name}: the tokenizer has no chat template, so chat rows cannot be rendered. Use an instruct "
            "model, set tokenizer.chat_template, or give rows with 'text'."
        )
    if on != "assistant":
        return None
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    todo = "Use on: completion, or put {% generation %} … {% endgeneration %} around the assistant's part"
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ModelError(
            f"{name}: on: assistant needs a chat template with marks, this one has none. {todo}."
        ) from error
    if not is_chat_template_stop_token_trained(tokenizer, template):
        raise ModelError(f"{name}: the marks of the chat template leave out the end of the assistant's turn. {todo}.")
    return template


def row_lengths(rows: Dataset, tokenizer: Any) -> np.ndarray:
    """Tokens of every row as it is trained on, chat template and end of text included; shape (rows,)."""
    from retain.data.json_rows import quiet

    def count(batch: dict[str, list[Any]]) -> dict[str, np.ndarray]:
        return {"tokens": batch_lengths(batch, tokenizer)}

    with quiet():
        counted = rows.map(count, batched=True, remove_columns=rows.column_names)
    return np.asarray(counted["tokens"], dtype=np.int64)


def batch_lengths(batch: dict[str, list[Any]], tokenizer: Any) -> np.ndarray:
    """The same for a batch of rows, given as columns."""
    if "text" in batch:
        extra = 1 if tokenizer.eos_token else 0
        return np.array([len(ids) + extra for ids in tokenizer(batch["text"])["input_ids"]], dtype=np.int64)
    if "messages" in batch:
        chats = batch["messages"]
    else:
        chats = [list(p) + list(c) for p, c in zip(batch["prompt"], batch["completion"])]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False)
    return np.array([len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]], dtype=np.int64)


def count_long(rows: Dataset, tokenizer: Any, max_length: int) -> int:
    """How many rows are longer than `max_length` tokens."""
    return int((row_lengths(rows, tokenizer) > max_length).sum())


def long_note(long: int, total: int, max_length: int, left_out: bool = False) -> str:
    """One sentence on rows that do not fit, for the plan and the report."""
    what = "left out" if left_out else "cut at the end"
    return f"{long} of {total} rows {'is' if long == 1 else 'are'} longer than {max_length} tokens: {what}"


# ------------------------------------------------------------------------------------------------ single rows


def _convert(row: dict[str, Any], number: int, form: str, where: str, on: str, list_choices: bool) -> dict[str, Any]:
    here = f"{where}, row {number + 1}"
    if form == "text":
        return {"text": _text(row["text"], f"{here}: 'text'")}
    chat = turns(row, form, here, list_choices)
    if on != "completion":
        return {"messages": chat}
    if chat[-1]["role"] != "assistant":
        raise DataError(f"{here}: the last turn is the {chat[-1]['role']}'s; it must be the assistant's.")
    return {"prompt": chat[:-1], "completion": chat[-1:]}


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where}: 'messages' is {_given(messages)}; a list of {{role, content}} is needed.")
    chat = []
    for number, turn in enumerate(messages, start=1):
        here = f"{where}, turn {number}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{here}: {_given(turn)} given; an object with role and content is needed.")
        if turn["role"] not in ROLES:
            raise DataError(f"{here}: unknown role {_given(turn['role'])}. Allowed: {', '.join(ROLES)}.")
        if turn.get("tool_calls"):
            chat.append({key: value for key, value in turn.items() if value is not None})
            continue
        chat.append({"role": turn["role"], "content": _text(turn["content"], f"{here}: 'content'")})
    roles = [turn["role"] for turn in chat]
    if "user" not in roles or "assistant" not in roles:
        raise DataError(f"{where}: turns of {', '.join(roles)}; at least one user and one assistant turn are needed.")
    if roles.index("assistant") < roles.index("user"):
        raise DataError(f"{where}: the assistant speaks before the user. Begin with the user's turn.")
    return chat


def _choices(choices: Any, where: str) -> list[str]:
    if not isinstance(choices, (list, tuple)) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' is {_given(choices)}; a list of two or more texts is needed.")
    return [_text(choice, f"{where}: choice {index}") for index, choice in enumerate(choices)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_given(value)}; text is needed.")
    if not value.strip():
        raise DataError(f"{where} is empty. Give a text or leave the row out.")
    return value


def _given(value: Any) -> str:
    if value is None:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{shown[:40]}…" if len(shown) > 41 else shown
