"""Branches against plain rows, both against a slow float64 reference and against lm-evaluation-harness."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig

from retain.errors import DataError, ModelError
from retain.models import likelihood
from retain.models.likelihood import choice_log_likelihoods, text_log_likelihood
from retain.models.rows import looking

PROMPTS = [
    "The capital of France is",
    "Question: which of these animals can fly, and which of them can swim in the cold northern sea?\nAnswer:",
    "",
    "你好， ",
    "x",
]
CHOICES = [
    [" Paris", " Rome", " Romeo and all the others", " Paris and Rome"],
    [" a", " b", " c"],
    ["The heart", "The lungs take in air", "Blood"],
    ["世界", "世人", "A"],
    [" same", " same", " other words"],
]
KINDS = ["llama", "qwen2", "mistral", "gpt2", "gpt_neox"]


def slow_choice(model, tokenizer, prompt, choice):
    """log p(choice | prompt) in float64, one token at a time, straight from the definition."""
    head = prompt.rstrip()
    if head:
        tokens = tokenizer.encode(prompt + choice)
        split = len(tokenizer.encode(head))
    else:
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(prompt + choice)]
        split = 1
    total = 0.0
    for end in range(split, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:end]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[tokens[end]].item()
    return total


def flat(scores):
    return torch.tensor([value for score in scores for value in score.log_likelihoods], dtype=torch.float64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_equal_plain_rows_and_the_definition(kind, attention, tokenizer):
    model = tiny_model(tokenizer, kind=kind, attn_implementation=attention)
    branched = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES, branches=True)
    plain = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES, branches=False)
    slow = [slow_choice(model.double(), tokenizer, p, c) for p, cs in zip(PROMPTS, CHOICES) for c in cs]
    assert flat(branched) == pytest.approx(flat(plain), abs=1e-4)
    assert flat(branched) == pytest.approx(torch.tensor(slow, dtype=torch.float64), abs=2e-4)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_result_does_not_depend_on_the_batch(batch_tokens, model, tokenizer):
    one_by_one = [choice_log_likelihoods(model, tokenizer, [p], [c])[0] for p, c in zip(PROMPTS, CHOICES)]
    seen = []
    scores = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES, batch_tokens, seen.append)
    assert flat(scores) == pytest.approx(flat(one_by_one), abs=1e-4)
    assert sum(seen) == len(PROMPTS)


def test_tokens_and_characters_are_those_of_the_choice(model, tokenizer):
    score = choice_log_likelihoods(model, tokenizer, ["Paris"], [[" Rome", "xyz"]])[0]
    assert score.tokens == [len(tokenizer.encode(" Rome")), 3]
    assert score.characters == [4, 3]
    assert score.truncated == 0


def test_a_space_after_the_prompt_counts_as_the_start_of_the_choice(model, tokenizer):
    left = choice_log_likelihoods(model, tokenizer, ["The capital "], [["of France", "is"]])
    right = choice_log_likelihoods(model, tokenizer, ["The capital"], [[" of France", " is"]])
    assert left[0].log_likelihoods == right[0].log_likelihoods


def test_probabilities_of_all_one_token_choices_add_up_to_one(model, tokenizer):
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    single = {t for t in tokens if t.startswith(" ") and len(tokenizer.encode("x" + t)) == 2}
    score = choice_log_likelihoods(model, tokenizer, ["x"], [sorted(single)])[0]
    with torch.no_grad():
        p = model(torch.tensor([tokenizer.encode("x")])).logits[0, -1].softmax(-1)
    ids = [tokenizer.encode(t)[0] for t in sorted(single)]
    assert len(single) > 20
    assert torch.tensor(score.log_likelihoods).exp() == pytest.approx(p[ids], abs=1e-5)


def test_long_prompts_are_cut_from_the_left_and_counted(tokenizer):
    model = tiny_model(tokenizer, max_position_embeddings=32)
    prompt = "The heart pumps blood. " * 20 + "The lungs take"
    score = choice_log_likelihoods(model, tokenizer, [prompt], [[" in air", " in blood"]])[0]
    tokens = tokenizer.encode(prompt + " in blood")
    with torch.no_grad():
        logp = model(torch.tensor([tokens[-33:-1]])).logits[0].log_softmax(-1)
    own = len(tokens) - len(tokenizer.encode(prompt))
    expected = sum(logp[32 - own + i, tokens[len(tokens) - own + i]].item() for i in range(own))
    assert score.log_likelihoods[1] == pytest.approx(expected, abs=1e-4)
    assert score.truncated == len(tokens) - 33


@pytest.mark.parametrize(("choices", "word"), [([[]], "no choices"), ([[" a", ""]], "no tokens")])
def test_empty_choices_are_an_error(choices, word, model, tokenizer):
    with pytest.raises(DataError, match=word):
        choice_log_likelihoods(model, tokenizer, ["Question:"], choices)


class Recorder:
    """Counts the rows that go through a model."""

    def __init__(self, model):
        self.rows = 0
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_masks_falls_back_to_plain_rows(dtype, model, tokenizer):
    model.to(dtype)
    forward = model.model.forward

    def deaf(*args, **kwargs):
        if kwargs.get("attention_mask") is not None and kwargs["attention_mask"].dim() == 4:
            kwargs["attention_mask"] = None
            kwargs["position_ids"] = None
        return forward(*args, **kwargs)

    plain = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES, branches=False)
    model.model.forward = deaf
    scores = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    assert likelihood._abilities[model].branches is False
    assert flat(scores) == pytest.approx(flat(plain), abs=1e-4 if dtype == torch.float32 else 0.5)
    wrong = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES, branches=True)
    assert (flat(wrong) - flat(plain)).abs().max() > 1  # the comparison had something to find


def test_a_model_that_can_branch_does(model, tokenizer):
    choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    recorder = Recorder(model)
    choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    assert recorder.rows == len(PROMPTS)


def test_rows_beyond_a_sliding_window_are_scored_plainly(tokenizer):
    prompts = ["x", "The heart pumps blood through the body. " * 3]
    choices = [[" one", " two things"], [" The lungs take", " in air and water"]]
    model = tiny_model(tokenizer, kind="mistral", sliding_window=16)
    plain = choice_log_likelihoods(model, tokenizer, prompts, choices, branches=False)
    scores = choice_log_likelihoods(model, tokenizer, prompts, choices)
    assert likelihood._abilities[model] == (True, 16)
    assert flat(scores) == pytest.approx(flat(plain), abs=1e-4)
    forced = choice_log_likelihoods(model, tokenizer, prompts, choices, branches=True)
    assert (flat(forced) - flat(plain)).abs().max() > 1e-2


def test_recurrent_models_are_scored_plainly(tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    scores = choice_log_likelihoods(model, tokenizer, PROMPTS[:2], CHOICES[:2])
    slow = [slow_choice(model, tokenizer, p, c) for p, cs in zip(PROMPTS[:2], CHOICES[:2]) for c in cs]
    assert likelihood._abilities[model].branches is False
    assert flat(scores) == pytest.approx(torch.tensor(slow, dtype=torch.float64), abs=1e-3)


def test_capped_logits_stay_capped(tokenizer):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.3, sliding_window=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    scores = choice_log_likelihoods(model, tokenizer, PROMPTS[:2], CHOICES[:2])
    slow = [slow_choice(model, tokenizer, p, c) for p, cs in zip(PROMPTS[:2], CHOICES[:2]) for c in cs]
    assert flat(scores) == pytest.approx(torch.tensor(slow, dtype=torch.float64), abs=2e-4)


def test_model_without_logits_to_keep_gives_the_same(model, tokenizer):
    expected = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    forward = model.forward

    def plain_forward(input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    other = tiny_model(tokenizer)
    forward = other.forward
    other.forward = plain_forward
    assert flat(choice_log_likelihoods(other, tokenizer, PROMPTS, CHOICES)) == pytest.approx(flat(expected), abs=1e-4)


def test_adapters_count_and_bf16_is_close(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    before = choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    assert flat(choice_log_likelihoods(adapted, tokenizer, PROMPTS, CHOICES)) == pytest.approx(flat(before), abs=1e-4)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    after = choice_log_likelihoods(adapted, tokenizer, PROMPTS, CHOICES)
    assert (flat(after) - flat(before)).abs().max() > 0.1
    half_model = tiny_model(tokenizer).bfloat16()
    half = choice_log_likelihoods(half_model, tokenizer, PROMPTS, CHOICES)
    assert likelihood._abilities[half_model].branches
    assert flat(half) == pytest.approx(flat(before), rel=0.05, abs=0.5)


def test_modes_gradients_and_flags_are_left_as_they_were(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    choice_log_likelihoods(model, tokenizer, PROMPTS, CHOICES)
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError), looking(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


def slow_text(model, tokenizer, text, window, stride):
    """Each token from the prefix and at most `window` tokens of its window, in float64."""
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    total, done = 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), done + (window if done == 1 else stride))
        start = max(0, end - 1 - window)
        with torch.no_grad():
            logp = model(torch.tensor([tokens[start : end - 1]])).logits[0].log_softmax(-1)
        total += sum(logp[i - 1 - start, tokens[i]].item() for i in range(done, end))
        done = end
    return total


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 4), (16, 1), (None, None), (10**6, None)])
def test_texts_by_windows(window, stride, model, tokenizer):
    texts = ["The heart pumps blood through the body. " * 3, "", "Rome", "七只小船"]
    seen = []
    scores = text_log_likelihood(model, tokenizer, texts, window, stride, 64, seen.append)
    width = min(window or 512, 512)
    expected = [slow_text(model.double(), tokenizer, text, width, stride or width) for text in texts]
    assert [s.log_likelihood for s in scores] == pytest.approx(expected, abs=1e-3)
    assert [s.tokens for s in scores] == [len(tokenizer.encode(text)) for text in texts]
    assert sum(seen) == len(texts)


def test_every_stride_with_the_whole_text_in_the_window_is_the_same(model, tokenizer):
    first = text_log_likelihood(model, tokenizer, ["The heart pumps blood."], 100, 100)[0]
    second = text_log_likelihood(model, tokenizer, ["The heart pumps blood."], 100, 1)[0]
    assert first == second


@pytest.mark.parametrize("stride", [-1, 17])
def test_impossible_strides_are_an_error(stride, model, tokenizer):
    with pytest.raises(DataError, match="stride"):
        text_log_likelihood(model, tokenizer, ["a"], 16, stride)


def test_a_bos_of_the_tokenizer_is_not_predicted(model, tokenizer):
    import tiny
    from tokenizers.processors import TemplateProcessing

    other = tiny.tiny_tokenizer.__wrapped__()
    other._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", other.bos_token_id)]
    )
    assert other.encode("Rome")[0] == other.bos_token_id
    assert text_log_likelihood(model, other, ["Rome"]) == text_log_likelihood(model, tokenizer, ["Rome"])


def test_no_prefix_token_is_an_error():
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(ModelError, match="EOS"):
        likelihood.prefix_token(Bare())


@pytest.fixture
def harness(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=4)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


@pytest.mark.parametrize("branches", [True, False])
def test_choices_equal_lm_evaluation_harness(branches, harness, model, tokenizer):
    prompts = [p for p in PROMPTS if p.strip() or not p]
    pairs = [(p, c) for p, cs in zip(prompts, CHOICES) for c in cs]
    expected = [value for value, _ in harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    scores = choice_log_likelihoods(model, tokenizer, prompts, CHOICES, branches=branches)
    assert flat(scores) == pytest.approx(torch.tensor(expected, dtype=torch.float64), abs=1e-4)


def test_texts_equal_lm_evaluation_harness(harness, model, tokenizer):
    texts = ["The heart pumps blood through the body; the lungs take in air. " * 5, "Rome", "七只小船"]
    expected = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]), True)
    scores = text_log_likelihood(model, tokenizer, texts, window=64)
    assert max(s.windows for s in scores) > 1
    assert [s.log_likelihood for s in scores] == pytest.approx(expected, abs=1e-3, rel=1e-6)
