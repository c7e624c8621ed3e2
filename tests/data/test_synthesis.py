"""Self-written rows: the header cut from three kinds of templates, filters, budget, and determinism."""

import copy
import hashlib
import itertools

import pytest

from retain.data.filters import Avoided, Filters, NearDuplicates, loops, main_script, to_last_sentence
from retain.data.synthesis import SHORT, STARTS, chat_header, write_rows
from retain.errors import ConfigError, DataError, ModelError

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def with_template(tokenizer, template, tokens=(), eos="<|im_end|>"):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    other.eos_token = eos
    return other


def test_header_of_chatml(tokenizer):
    header = chat_header(with_template(tokenizer, CHATML))
    assert header.before == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert header.between == "<|im_end|>\n<|im_start|>assistant\n"
    assert header.ends == ("<|im_end|>",)


def test_header_of_llama_3(tokenizer):
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    header = chat_header(with_template(tokenizer, LLAMA, tokens, eos="<|endoftext|>"))
    assert header.before == "<|endoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    assert header.between == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert header.ends == ("<|eot_id|>", "<|endoftext|>")
    assert set(tokens) <= set(header.roles)


def test_header_of_gemma(tokenizer):
    header = chat_header(with_template(tokenizer, GEMMA, ["<start_of_turn>", "<end_of_turn>"], eos="<|endoftext|>"))
    assert header.before == "<|endoftext|><start_of_turn>user\n"
    assert header.between == "<end_of_turn>\n<start_of_turn>model\n"
    assert header.ends == ("<end_of_turn>", "<|endoftext|>")


def test_header_without_special_tokens(tokenizer):
    header = chat_header(with_template(tokenizer, BRACKETS))
    assert header.before == "<|endoftext|>[INST] "
    assert header.ends[0] == "[/INST]"


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA, BRACKETS])
def test_the_header_is_the_template(tokenizer, template):
    """The text that the model is shown is the template's own rendering, character for character."""
    other = with_template(tokenizer, template)
    header = chat_header(other)
    shown = other.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert header.before + "Why?" + header.between == shown


def test_templates_that_cannot_be_cut(tokenizer):
    with pytest.raises(ModelError, match="changes what is said"):
        chat_header(with_template(tokenizer, "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}"))
    with pytest.raises(ModelError, match="no chat template"):
        chat_header(with_template(tokenizer, None))


# ------------------------------------------------------------------------------------------------- a fake model

WORDS = ("river", "stone", "music", "garden", "winter", "paper", "engine", "ocean", "candle", "forest", "bridge")


def words(seed, count):
    digest = hashlib.sha256(seed.encode()).digest()
    return " ".join(WORDS[digest[i] % len(WORDS)] for i in range(count))


class Model:
    """Writes words that depend on its prompt and on how often it was asked; notes what it was asked."""

    def __init__(self, tokenizer, instruction=None, answer=None):
        self.header, self.calls = chat_header(tokenizer), []
        self.instruction = instruction or (lambda prompt, n: f" {words(f'{prompt}{n}', 6)}?<|im_end|>\nrest")
        self.answer = answer or (lambda prompt, n: words(prompt, 5) + ".<|im_end|>")

    def __call__(self, prompts, temperature, limit):
        self.calls.append((prompts, temperature, limit))
        answering = prompts[0].endswith(self.header.between)
        say = self.answer if answering else self.instruction
        return [say(prompt, 100 * len(self.calls) + i) for i, prompt in enumerate(prompts)]


def test_rows_are_chats_and_the_budget_is_kept(tokenizer):
    model, kept = Model(tokenizer), []
    rows, report = write_rows(model, tokenizer, 50, batch=16, bare=0.2, progress=kept.append)
    assert len(rows) == sum(kept) == report.kept == 50
    assert report.kept + sum(report.dropped.values()) == report.tried
    for row in rows:
        assert [turn["role"] for turn in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert "<|im_end|>" not in row["prompt"][0]["content"] + row["completion"][0]["content"]
        assert row["completion"][0]["content"].endswith(".")
    asked = [row["prompt"][0]["content"] for row in rows]
    assert len(set(asked)) == 50
    assert len({next((s for s in STARTS if text.startswith(s)), "") for text in asked}) > 20
    header = model.header
    for number, (prompts, temperature, limit) in enumerate(model.calls):
        assert all(prompt.startswith(header.before) for prompt in prompts)
        assert len(prompts) <= 16
        assert (temperature, limit) == ((1.0, 64), (0.7, 192))[number % 2]


def test_the_same_seed_gives_the_same_rows(tokenizer):
    one, two, three = (
        write_rows(Model(tokenizer), tokenizer, 30, seed=seed, batch=8)[0].to_list() for seed in (1, 1, 2)
    )
    assert one == two
    assert one != three


@pytest.mark.parametrize(
    ("instruction", "answer", "reason"),
    [
        (" no end " + "word " * 80, None, "unfinished instruction"),
        ("<|im_end|>", None, "empty"),
        (" a<|im_start|>user b c d<|im_end|>", None, "special tokens inside"),
        ("x<|im_end|>", None, "too short"),
        (" one two three four" * 12 + "<|im_end|>", None, "repeats itself"),
        (" the very same question again and again?<|im_end|>", None, "near-duplicate"),
        (None, "word " * 300, "unfinished answer"),
        (None, "<|im_end|>", "empty answer"),
        (None, "a<|im_start|>b<|im_end|>", "special tokens inside"),
        (None, "x<|im_end|>", "too short"),
        (None, "so it goes on " * 12 + "<|im_end|>", "repeats itself"),
    ],
)
def test_what_is_left_out_is_counted(tokenizer, instruction, answer, reason):
    model = Model(
        tokenizer,
        instruction=(lambda prompt, n: instruction) if instruction else None,
        answer=(lambda prompt, n: answer) if answer else None,
    )
    settings = {"starts": (), "bare": 1.0, "batch": 8, "tries": 2}
    if reason == "near-duplicate":
        rows, report = write_rows(model, tokenizer, 4, **settings)
        assert (len(rows), report.dropped[reason]) == (1, report.tried - 1)
        return
    with pytest.raises(DataError, match=reason):
        write_rows(model, tokenizer, 4, **settings)


def test_an_answer_that_repeats_the_instruction(tokenizer):
    model = Model(tokenizer, answer=lambda prompt, n: prompt.split("user\n")[1].split("<|im_end|>")[0] + "<|im_end|>")
    with pytest.raises(DataError, match="answer repeats the instruction"):
        write_rows(model, tokenizer, 4, tries=1)


def test_an_instruction_may_lose_its_unfinished_end(tokenizer):
    model = Model(tokenizer, instruction=lambda prompt, n: f" {words(str(n), 5)}? And " + "more " * 100)
    rows, _ = write_rows(model, tokenizer, 3, starts=("Tell",))
    assert all(row["prompt"][0]["content"].endswith("?") for row in rows)


def test_engines_that_strip_marks_and_spaces(tokenizer):
    model = Model(
        tokenizer,
        instruction=lambda prompt, n: words(f"{prompt}{n}", 6) + "?",
        answer=lambda prompt, n: words(prompt, 5) + ".",
    )
    rows, _ = write_rows(model, tokenizer, 5, starts=("What is",), bare=0)
    assert all(row["prompt"][0]["content"].startswith("What is ") for row in rows)


def test_probe_items_are_avoided(tokenizer):
    first, _ = write_rows(Model(tokenizer), tokenizer, 10, batch=10)
    items = [row["prompt"][0]["content"].upper() for row in first]
    second, report = write_rows(Model(tokenizer), tokenizer, 10, batch=10, filters=Filters(avoid=items))
    assert report.dropped["near a probe item"] >= 10
    assert not {row["prompt"][0]["content"].upper() for row in second} & set(items)


def test_neither_answers_nor_plain_texts_repeat_probe_items(tokenizer):
    item = "Few visitors bought any postcards."
    model = Model(tokenizer, answer=lambda prompt, n: (f"{words(prompt, 5)}." if n % 2 else item) + "<|im_end|>")
    rows, report = write_rows(model, tokenizer, 10, filters=Filters(avoid=[item]))
    assert report.dropped["near a probe item"] > 0
    assert not any(item in row["completion"][0]["content"] for row in rows)
    said = iter(f" {words(str(n), 9)}. {item if n % 2 else 'Rain fell.'} {words(str(-n), 9)}." for n in range(400))
    rows, report = write_rows(
        lambda prompts, *rest: [next(said) for _ in prompts], with_template(tokenizer, None), 10,
        filters=Filters(avoid=[item.upper()]),
    )  # fmt: skip
    assert report.dropped["near a probe item"] > 0
    assert not any(item in row["text"] for row in rows)


def test_words_behind_an_instruction_do_not_make_it_a_probe_item(tokenizer):
    rows, report = write_rows(
        Model(tokenizer, instruction=lambda prompt, n: f" {words(f'{prompt}{n}', 3)}<|im_end|>"), tokenizer, 12,
        starts=(), endings=(" Tell me which of these is the hottest, please.", ""),
        filters=Filters(avoid=["Which of these is the hottest?"]),
    )  # fmt: skip
    assert report.dropped["near a probe item"] > 0
    assert not any("hottest" in row["prompt"][0]["content"] for row in rows)


def test_shares_of_scripts(tokenizer):
    def instruction(prompt, n):
        return (
            f" {words(str(n), 6)}?" if n % 2 else "".join(chr(0x4E00 + (n * 37 + i * 11) % 999) for i in range(9))
        ) + ("<|im_end|>")

    model = Model(tokenizer, instruction=instruction)
    rows, report = write_rows(
        model, tokenizer, 20, starts=(), filters=Filters(scripts={"cjk": 0.25}), batch=8, tries=20
    )
    scripts = [main_script(row["prompt"][0]["content"]) for row in rows]
    assert scripts.count("cjk") <= 5
    assert report.dropped["over the share of its script"] > 0


def test_short_answers_are_asked_for(tokenizer):
    model = Model(tokenizer)
    rows, _ = write_rows(model, tokenizer, 16, filters=Filters(response_tokens=50), batch=16)
    ended = [sum(row["prompt"][0]["content"].endswith(ending) for row in rows) for ending in SHORT[:3]]
    assert min(ended) >= 2
    rows, _ = write_rows(model, tokenizer, 16, endings=(" Be brief.",))
    assert all(row["prompt"][0]["content"].endswith("? Be brief.") for row in rows)


def test_plain_text_without_a_template(tokenizer):
    base = with_template(tokenizer, None)
    asked = []

    def write(prompts, temperature, limit):
        asked.extend(prompts)
        return [f" {words(str(len(asked) * 50 + i), 8)}. And {words(str(i), 30)}" for i in range(len(prompts))]

    rows, report = write_rows(write, base, 6, starts=("Once", "The"), filters=Filters(response_tokens=32))
    assert rows.column_names == ["text"]
    assert all(row["text"].split()[0] in ("Once", "The") and row["text"].endswith(".") for row in rows)
    assert set(asked) == {"<|endoftext|>Once", "<|endoftext|>The"}
    assert report.kept == 6


def test_it_gives_up_in_time(tokenizer):
    model = Model(tokenizer, instruction=lambda prompt, n: "<|im_end|>")
    with pytest.raises(DataError, match="0 of 40 rows"):
        write_rows(model, tokenizer, 10, starts=(), batch=16, tries=4)


@pytest.mark.parametrize(
    "setting",
    [
        {"number": 0},
        {"batch": 0},
        {"temperature": 0},
        {"answer_temperature": 0.9},
        {"bare": 2},
        {"filters": Filters(prompt_tokens=1)},
    ],
)
def test_impossible_settings(tokenizer, setting):
    with pytest.raises(ConfigError):
        write_rows(Model(tokenizer), tokenizer, **{"number": 5, **setting})


# ------------------------------------------------------------------------------------------------- the filters


def test_near_duplicates_are_the_jaccard_index():
    def shingles(text):
        parts = text.lower().split()
        return set(parts) | {" ".join(pair) for pair in itertools.pairwise(parts)}

    texts = [words(str(i), 4 + i % 3) for i in range(60)] + ["river stone music", "river stone paper"]
    for threshold in (0.2, 0.5, 0.9):
        near = NearDuplicates(threshold)
        for count, text in enumerate(texts):
            slow = any(
                len(shingles(text) & shingles(old)) >= threshold * len(shingles(text) | shingles(old))
                for old in texts[:count]
            )
            assert near.seen(text) == slow
            near.add(text)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("What is the boiling point of WATER", True),
        ("Tell me: what is the boiling point of water? Then tell me what it is on a high mountain in winter.", True),
        ("what is the boiling point of water?\n- 90\n- 100\n- 110\n- it depends on the day of the week", True),
        ("the boiling point of water", True),  # stands in an item
        ("point of water", False),  # three words may do so by chance
        ("Yes, and no", False),
        ("If you ask me whether I like it, then I say yes or no, and nothing else", False),  # a short item in it
        ("What is the melting point of steel in a furnace?", False),
        ("", False),
    ],
)
def test_what_repeats_a_text_to_be_avoided(text, repeats):
    avoided = Avoided(["What is the boiling point of water?", "Yes or no?"])
    assert avoided(text) is repeats
    assert Avoided([])(text) is False


def test_one_spelling_for_duplicates():
    near = NearDuplicates(0.99)
    near.add("What's the CAPITAL of ｆrance?")
    assert near.seen("what's the capital of france")
    near.add("中国的首都是哪里")
    assert near.seen("中国的首都是哪里？")
    assert not near.seen("法国的首都是哪里？")


def test_loops_and_scripts_and_sentences():
    assert loops("over and over " * 5, 0.7)
    assert not loops("a b c d", 0.7)
    assert not loops(words("x", 12) + " quite a different ending of the text", 0.7)
    assert [main_script(text) for text in ("abc", "中文字", "Привет", "123")] == ["latin", "cjk", "cyrillic", "none"]
    assert to_last_sentence('He said "no." Then he') == 'He said "no."'
    assert to_last_sentence("It costs 3.50 and 2. times") == ""
    assert to_last_sentence("你好。再") == "你好。"
