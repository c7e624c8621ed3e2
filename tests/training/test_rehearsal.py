"""Passes without weights cost what the same passes with weights cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import SETTINGS, VOCABULARY, family_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, GPT2Config, Trainer
from trl import SFTConfig

from retain.config import ModelConfig
from retain.errors import ConfigError, ModelError
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.methods.freeze import Freeze
from retain.methods.lora import LoRA
from retain.methods.shared_lora import SharedLoRA
from retain.models import params
from retain.models.load import load_model
from retain.models.weightless import Weightless
from retain.training.rehearsal import Batch, Rehearsal

STACKS = {
    "full": lambda: [],
    "lora": lambda: [LoRA(r=4)],
    "freeze": lambda: [Freeze(share=0.5)],
    "both": lambda: [LoRA(r=4), Freeze(share=0.5)],
    "shared": lambda: [LoRA(r=4), SharedLoRA(r=2)],
}


def quiet() -> Run:
    return Run(Path("nowhere"), say=lambda line: None)


def rehearsal(folder, methods=(), **options) -> Rehearsal:
    return Rehearsal(Weightless(ModelConfig(name=str(folder))), Stack(methods), quiet(), **options)


def config_only(folder: Path, config) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2", "opt"])
@pytest.mark.parametrize("stack", STACKS)
def test_counts_are_those_of_the_loaded_model(kind, stack, tmp_path):
    model = family_model(kind)
    model.save_pretrained(tmp_path)
    found = rehearsal(tmp_path, STACKS[stack]())
    loaded, _ = load_model(ModelConfig(name=str(tmp_path)), tokenizer=False)
    assert (found.trainable, found.parameters) == params.counts(Stack(STACKS[stack]()).prepare_model(loaded, quiet()))


def test_no_weights_are_read(tmp_path):
    config = AutoConfig.for_model("llama", **SETTINGS["llama"] | {"head_dim": 2**13}, vocab_size=10**6)
    config.hidden_size, config.intermediate_size = 2**15, 2**17  # 64 billion parameters
    model = Weightless(ModelConfig(name=str(config_only(tmp_path, config)), dtype="bfloat16"))
    assert model.bytes() > 2**36
    assert all(p.device.type == "meta" for p in model.model.parameters())


@pytest.mark.parametrize("stack", STACKS)
def test_what_backward_needs_is_counted(stack, tmp_path):
    """The tensors that autograd keeps in a real pass are the activations, but for what a single layer makes besides."""
    tiny_model(tiny_tokenizer(), num_hidden_layers=12).save_pretrained(tmp_path)
    batch = Batch(rows=4, width=16, learned=20)
    counted = rehearsal(tmp_path, STACKS[stack]()).micro_batch(batch).held["activations"]
    model, _ = load_model(ModelConfig(name=str(tmp_path)), tokenizer=False)
    model = Stack(STACKS[stack]()).prepare_model(model, quiet()).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 300, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        params.hidden_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    really = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert really <= counted <= 1.2 * really


def test_activations_agree_with_the_published_count(tmp_path):
    """Korthikanti et al. 2022, arXiv:2205.05198, eq. 1 and 2: 34 s b h bytes a layer in 16 bits, of which 2 s b h are
    dropout masks; the scores of attention are not kept by a fused kernel."""
    width, length, rows = 64, 32, 4
    held = []
    for layers in (2, 6):
        config = GPT2Config(
            vocab_size=90, n_embd=width, n_layer=layers, n_head=2, n_positions=64, activation_function="gelu",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        folder = config_only(tmp_path / str(layers), config)
        model = Weightless(ModelConfig(name=str(folder), dtype="bfloat16"))
        batch = Batch(rows, length, learned=8)
        held.append(Rehearsal(model, Stack([]), quiet()).micro_batch(batch).held["activations"])
    layer = (held[1] - held[0]) / 4
    assert layer == pytest.approx(32 * length * rows * width, rel=0.15)


def test_arithmetic_is_six_operations_per_weight_and_token(tiny_folder):
    """Forward 2, backward 2 for what goes in and 2 for the weights (Kaplan et al. 2020, arXiv:2001.08361, table 1)."""
    rows, width = 4, 8
    batch = Batch(rows, width, learned=1)
    full = rehearsal(tiny_folder)
    model = full.weightless.model
    matrices = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    scores = 2 * 4 * rows * 32 * width**2  # layers · (QKᵀ and PV) · rows · width of all heads · length²
    flops = full.micro_batch(batch).flops - full._head(1).flops
    assert flops == 6 * matrices * rows * width + scores * 3.5
    lora = rehearsal(tiny_folder, [LoRA(r=4)]).micro_batch(batch)
    assert 4 * matrices * rows * width < lora.flops < flops


def test_more_rows_and_longer_ones_take_more(tiny_folder):
    made = rehearsal(tiny_folder, [LoRA(r=4)], half=torch.bfloat16)
    costs = [made.micro_batch(Batch(*shape)) for shape in ((2, 8, 6), (4, 8, 12), (4, 16, 24))]
    for smaller, larger in itertools.pairwise(costs):
        assert smaller.flops < larger.flops
        assert smaller.held["activations"] < larger.held["activations"]
        assert smaller.held["head"] < larger.held["head"]
        assert smaller.held["weights_cast"] == larger.held["weights_cast"] > 0


def test_a_teacher_takes_more(tiny_folder):
    made = rehearsal(tiny_folder, [LoRA(r=4)])
    alone, taught = (made.micro_batch(Batch(4, 8, 12, taught)) for taught in (0, 2))
    assert taught.flops > alone.flops
    assert taught.held["activations"] > alone.held["activations"]


def test_checkpointing_trades_arithmetic_for_memory(tiny_folder):
    batch = Batch(4, 64, 40)
    plain, checkpointed = (rehearsal(tiny_folder, checkpointing=on).micro_batch(batch) for on in (False, True))
    assert checkpointed.held["activations"] < 0.7 * plain.held["activations"]
    assert checkpointed.flops > plain.flops


def test_half_precision_copies_are_those_of_the_layers(tiny_folder):
    made = rehearsal(tiny_folder, [LoRA(r=4)], half=torch.bfloat16)
    held = made.micro_batch(Batch(2, 8, 6)).held
    decoder = params.causal(made.weightless.model).model
    linear = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    attention = decoder.layers[0].self_attn  # the embeddings need no gradient, so these frozen weights are not kept
    released = sum(getattr(attention, f"{name}_proj").base_layer.weight.numel() for name in "qkv")
    assert held["weights_cast"] == 2 * (linear - released)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_states_are_those_of_the_optimizer(name, tiny_folder, tmp_path):
    args = SFTConfig(str(tmp_path), optim=name, use_cpu=True, bf16=False)
    notes: list[str] = []
    found = rehearsal(tiny_folder).update(args, notes).held["states"]
    model, _ = load_model(ModelConfig(name=str(tiny_folder)), tokenizer=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    made = optimizer(model.parameters(), **settings)
    made.step()
    states = [v for state in made.state.values() for v in state.values() if torch.is_tensor(v)]
    assert found == sum(v.numel() * v.element_size() for v in states)
    assert not notes


def test_an_optimizer_that_needs_a_gpu_is_assumed(tiny_folder, monkeypatch):
    class OnGpu(torch.optim.SGD):
        def step(self, closure=None):
            raise AssertionError("needs a GPU")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args: (OnGpu, {"lr": 0.1}))
    notes: list[str] = []
    made = rehearsal(tiny_folder)
    args = SimpleNamespace(optim="adamw_8bit", max_grad_norm=1.0)
    assert made.update(args, notes).held["states"] == 2 * made.trainable
    assert "adamw_8bit" in notes[0]


def test_an_optimizer_that_is_not_installed_is_an_error(tiny_folder, monkeypatch):
    def missing(args):
        raise ImportError("no such package.")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(ConfigError, match=r"train\.optim: lomo cannot be used here \(no such package\)"):
        rehearsal(tiny_folder).update(SimpleNamespace(optim="lomo", max_grad_norm=0), [])


def test_importances_hold_all_their_gradients_at_once(tiny_folder):
    batch = Batch(1, 4, 1)
    for methods in ([], [LoRA(r=4)]):
        made = rehearsal(tiny_folder, methods)
        pairs = params.lora_pairs(made.weightless.model).values()
        weights = [pair.base for pair in pairs] or list(made.weightless.model.parameters())
        gradients = sum(4 * p.numel() for p in weights)
        assert made.importance(batch).held["activations"] > gradients
        assert not any(pair.base.requires_grad for pair in pairs)
    assert made.importance(batch, quantised=True).held["activations"] < made.importance(batch).held["activations"]


def test_a_look_holds_no_more_than_a_layer(tiny_folder):
    made = rehearsal(tiny_folder, half=torch.bfloat16)
    look, step = made.look(4, 16), made.micro_batch(Batch(4, 16, 1))
    assert look.held["activations"] < 0.5 * step.held["activations"]
    assert 0 < look.flops < step.flops / 2
    assert all(p.grad is None for p in made.weightless.model.parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_can_be_rehearsed_in_bfloat16(kind, tmp_path):
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    settings = SETTINGS["llama"] | {"hidden_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2} | experts
    config = AutoConfig.for_model(kind, **settings, vocab_size=VOCABULARY)
    name = ModelConfig(name=str(config_only(tmp_path, config)))
    made = Rehearsal(Weightless(name, torch.bfloat16), Stack([]), quiet())
    two, three = (made.micro_batch(Batch(rows, 8, 4)).flops for rows in (2, 3))
    active = 3 * 64 * (32 if kind == "qwen3_moe" else 48) * 2 * 2  # three matrices, two layers, two experts a token
    assert three - two > 6 * active * 8 * 0.9


def test_quantised_weights_are_smaller(tiny_folder):
    model = Weightless(ModelConfig(name=str(tiny_folder)))
    whole = model.bytes()
    linear = sum(m.weight.numel() for m in model.model.base_model.modules() if isinstance(m, torch.nn.Linear))
    assert whole == 4 * sum(p.numel() for p in model.model.parameters())
    assert model.bytes("8bit") == whole - 3 * linear
    assert whole - 3.5 * linear < model.bytes("4bit") < whole - 3.4 * linear


def test_an_adapter_is_built_on_its_base(tmp_path):
    base = tiny_model(tiny_tokenizer())
    base.save_pretrained(tmp_path / "base")
    model, _ = load_model(ModelConfig(name=str(tmp_path / "base")), tokenizer=False)
    LoRA(r=4).prepare_model(model, quiet()).save_pretrained(tmp_path / "adapter")
    found = Weightless(ModelConfig(name=str(tmp_path / "adapter")))
    assert params.counts(found.model)[1] == params.counts(base)[1]


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="'nowhere/at-all' is no folder that is there") as caught:
        Weightless(ModelConfig(name="nowhere/at-all"))
    assert "\n" not in str(caught.value)
