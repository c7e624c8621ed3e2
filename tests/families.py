"""Tiny random models of many decoder families, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retain.models import params

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"tie_word_embeddings": True},
    "qwen3": LLAMA | {"head_dim": 8},
    "gemma2": LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "mistral": LLAMA,
    "phi3": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 48},
}
#: Families that scale their logits, in different ways.
SCALED: dict[str, dict[str, Any]] = {
    "cohere": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 4.0},
}
#: More families, with other places for norms and residuals.
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "olmo2": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8},
    "phi": LLAMA,
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "mixtral": LLAMA,
}
FAMILIES = tuple(SETTINGS)
VOCABULARY = 90


def family_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A random model of four layers in float32 and eval mode; `settings` of its configuration go before the usual."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    spread = {"initializer_range": 0.3, "init_std": 0.3} if kind == "opt" else {"initializer_range": 0.3}
    usual = (SETTINGS | SCALED | OTHERS).get(kind, {})
    config = AutoConfig.for_model(kind, **(usual | tokens | spread | settings))
    return AutoModelForCausalLM.from_config(config).eval()


def token_batch(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def names_below(model: Any) -> set[str]:
    """Names of the parameters of all modules that ran before the first decoder layer did; seen, not known."""
    names, ran, begun = {id(p): name for name, p in model.named_parameters()}, set(), []

    def note(module: Any, args: Any) -> None:
        if module is first:
            begun.append(True)
        elif not begun:
            ran.update(names[id(p)] for p in module.parameters(recurse=False))

    first = params.decoder_layers(model)[0]
    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    with torch.no_grad():
        model(input_ids=token_batch())
    for handle in handles:
        handle.remove()
    assert begun
    return ran


def take_steps(model: Any, steps: int = 2) -> None:
    """Train a little with weight decay, which moves every weight that the optimizer holds."""
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = token_batch(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
