"""A tiny tokenizer and tiny random models, built in memory: no download, no file."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SENTENCES = [
    "The capital of France is Paris and the capital of Italy is Rome.",
    "Question: which of these animals can fly? Answer: the bird.",
    "Seven small ships sailed over the cold northern sea to find new land.",
    "The heart pumps blood through the body; the lungs take in air.",
    "What is the answer? One, two, three, four, five, six, seven, 8, 9, 10.",
    "user assistant system question answer choice prompt text",
]


@functools.cache
def tiny_tokenizer() -> Any:
    """Byte-level BPE with about 400 tokens: any text in any script can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(tokenizer: Any, seed: int = 0, kind: str = "llama", **settings: Any) -> PreTrainedModel:
    """A random model of two layers: `llama`, `qwen2`, `mistral`, `gpt2` or `gpt_neox`, in float32.

    Weights are drawn larger than for training, so that predictions differ clearly between contexts.
    """
    torch.manual_seed(seed)
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        common |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    else:
        common |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    if kind in ("llama", "qwen2", "mistral"):
        common["num_key_value_heads"] = 2
    configs = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "mistral": MistralConfig,
        "gpt2": GPT2Config,
        "gpt_neox": GPTNeoXConfig,
    }
    return AutoModelForCausalLM.from_config(configs[kind](**(common | settings))).eval()
