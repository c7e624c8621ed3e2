"""Rows into chats: every form, every malformed row, the template checks and the lengths."""

import pytest
from datasets import Dataset, IterableDataset

from retain.data.chat import choice_index, count_long, long_note, prompt_text, row_lengths, template_check, to_chat
from retain.errors import ConfigError, DataError, ModelError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def chat(rows, **settings):
    return list(to_chat(Dataset.from_list(rows), "f.jsonl", **settings))


def fails(row, **settings):
    with pytest.raises(DataError) as caught:
        chat([row], **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompt_and_response():
    row = {"id": 1, "prompt": "q", "response": "a", "answers": ["a"]}
    assert chat([row]) == [{"prompt": [USER], "completion": [ASSISTANT]}]
    for on in ("assistant", "all"):
        assert chat([row], on=on) == [{"messages": [USER, ASSISTANT]}]
    with pytest.raises(ConfigError, match="Allowed: all, assistant, completion"):
        chat([row], on="response")


def test_messages():
    talk = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert chat([{"messages": talk}]) == [{"prompt": talk[:-1], "completion": talk[-1:]}]
    assert chat([{"messages": talk[:-1]}], on="assistant") == [{"messages": talk[:-1]}]


def test_text_rows_stay_text():
    for on in ("completion", "all"):
        assert chat([{"text": "once", "id": 3}], on=on) == [{"text": "once"}]


def test_choices_are_listed_and_the_text_is_the_answer():
    row = {"question": "Largest?", "choices": ["ant", "whale"], "answer": 1}
    (made,) = chat([row])
    assert made["prompt"][0]["content"] == "Largest?\n- ant\n- whale"
    assert made["completion"] == [{"role": "assistant", "content": "whale"}]
    assert chat([row], list_choices=False)[0]["prompt"][0]["content"] == "Largest?"


@pytest.mark.parametrize("answer", [1, 1.0, "1", "B", "b", "(B)", "whale", " whale "])
def test_an_answer_is_an_index_a_letter_or_a_text(answer):
    assert choice_index(answer, ["ant", "whale", "cow"]) == 1


def test_an_answer_that_can_mean_two_choices_is_refused():
    with pytest.raises(DataError, match="can mean choice 0 or 1"):
        choice_index("1", ["1", "2"])
    with pytest.raises(DataError, match="can mean choice 0 or 1"):
        choice_index("A", ["B", "A"])
    assert choice_index("B", ["A", "B"]) == 1
    assert choice_index(1, ["1", "2"]) == 1
    assert choice_index("1980", ["1931", "1980"]) == 1


@pytest.mark.parametrize("answer", [2, -1, "2", "C", "cow", None, True, 0.5, [0]])
def test_an_answer_that_is_no_choice(answer):
    with pytest.raises(DataError, match="Allowed: 0 to 1, A to B"):
        choice_index(answer, ["ant", "whale"])


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "q", "response": " "}, ["f.jsonl, row 1", "'response' is empty"]),
        ({"prompt": "", "response": "a"}, ["'prompt' is empty"]),
        ({"prompt": "q", "response": None}, ["'response' is missing"]),
        ({"prompt": "q", "response": 4}, ["'response' is 4", "text is needed"]),
        ({"text": ""}, ["'text' is empty"]),
        ({"messages": []}, ["a list of {role, content}"]),
        ({"messages": "hi"}, ["'messages' is \"hi\""]),
        ({"messages": [{"role": "user", "text": "q"}]}, ["turn 1", "role and content"]),
        ({"messages": [{"role": "human", "content": "q"}, ASSISTANT]}, ["turn 1", "unknown role", "user"]),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["turn 2: 'content' is empty"]),
        ({"messages": [USER]}, ["at least one user and one assistant"]),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, ["speaks before the user"]),
        ({"messages": [USER, ASSISTANT, USER]}, ["last turn is the user's"]),
        ({"question": "q", "choices": ["a"], "answer": 0}, ["two or more"]),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, ["out of range for 2 choices"]),
        ({"question": "q", "choices": [1, 2], "answer": 0}, ["choice 0 is 1"]),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, ["choice 1 is empty"]),
        ({"input": "q", "output": "a"}, ["columns input, output", "prompt/response", "columns"]),
    ],
)
def test_rows_that_cannot_be_used(row, parts):
    message = fails(row)
    assert all(part in message for part in parts)


def test_the_number_of_the_row_is_given():
    with pytest.raises(DataError, match="row 3"):
        chat([{"text": "a"}, {"text": "b"}, {"text": ""}])


def test_a_stream_stays_a_stream():
    rows = IterableDataset.from_generator(
        lambda: iter([{"prompt": "q", "response": "a"}, {"prompt": "q", "response": ""}])
    )
    made = to_chat(rows, "f.jsonl")
    assert isinstance(made, IterableDataset)
    assert next(iter(made)) == {"prompt": [USER], "completion": [ASSISTANT]}
    with pytest.raises(DataError, match="row 2"):
        list(made)


def test_prompt_text_is_one_spelling():
    assert prompt_text({"prompt": "What  IS\nit?"}, "response") == "what is it?"
    one = prompt_text({"question": "Which?", "choices": ["a", "b"]}, "choices")
    assert one == prompt_text({"question": "which?", "choices": ["b", "a"]}, "choices")
    assert one != prompt_text({"question": "which?", "choices": ["b", "c"]}, "choices")
    assert prompt_text({"messages": [USER, ASSISTANT]}, "messages") == "q"


def test_templates(tokenizer):
    import copy

    from trl.chat_template_utils import qwen3_chat_template

    assert template_check(tokenizer) is None
    with pytest.raises(ModelError, match="on: completion"):
        template_check(tokenizer, "assistant")
    none = copy.deepcopy(tokenizer)
    none.chat_template = None
    assert template_check(none, chat=False) is None
    with pytest.raises(ModelError, match="no chat template"):
        template_check(none)
    known = copy.deepcopy(tokenizer)
    known.chat_template = qwen3_chat_template
    template = template_check(known, "assistant")
    assert "generation" in template
    talk = [USER, ASSISTANT, USER, ASSISTANT]
    masked = known.apply_chat_template(
        talk, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    assert sum(masked["assistant_masks"]) > 0
    marked = copy.deepcopy(tokenizer)
    body = "{{ m['content'] }}"
    marked.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}" + body + "{% endgeneration %}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ModelError, match="leave out the end"):
        template_check(marked, "assistant")


def test_lengths_are_those_of_training(tokenizer, tmp_path):
    """Against TRL's own preparation of the same rows: one token sequence per row, not cut."""
    import tiny
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "q" * n, "response": "a b c " * n} for n in (1, 5, 20)]
    made = to_chat(Dataset.from_list(rows), "f")
    texts = to_chat(Dataset.from_list([{"text": "word " * n} for n in (1, 5, 20)]), "f")
    for data in (made, texts):
        arguments = SFTConfig(output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True)
        trainer = SFTTrainer(tiny.tiny_model(tokenizer), arguments, train_dataset=data, processing_class=tokenizer)
        expected = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        lengths = row_lengths(data, tokenizer)
        assert lengths.tolist() == expected
        assert count_long(data, tokenizer, int(lengths[1])) == 1
        assert count_long(data, tokenizer, int(lengths[1]) - 1) == 2
    both = to_chat(Dataset.from_list(rows), "f", on="all")
    assert row_lengths(both, tokenizer).tolist() == row_lengths(made, tokenizer).tolist()


def test_the_note():
    assert long_note(12, 400, 256) == "12 of 400 rows are longer than 256 tokens: cut at the end"
    assert long_note(1, 400, 256, left_out=True) == "1 of 400 rows is longer than 256 tokens: left out"
