"""Adam's second moment as an importance: that of the formula, from a live optimizer and from its file."""

import pytest
import torch
from families import family_model
from training_kit import train

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import moments, params

SLOW = {"optim": "adamw_torch", "adam_beta2": 0.9, "max_grad_norm": 0.0}


def test_it_is_the_bias_corrected_mean_of_squares_by_hand():
    """Each weight has its own number of steps; v / (1 − β₂^n) is the weighted mean of g² over them."""
    model = family_model("llama").double()
    learning = params.trainable(model)
    optimizer = torch.optim.Adam(learning.values(), lr=1e-3, betas=(0.9, 0.8))
    torch.manual_seed(0)
    late, never = list(learning)[1], list(learning)[2]
    seen = {name: [] for name in learning}
    for step in range(5):
        for name, p in learning.items():
            p.grad = None if name == never or (name == late and step < 3) else torch.randn_like(p)
            if p.grad is not None:
                seen[name].append(p.grad.clone())
        optimizer.step()
    found = moments.second_moments(model, lambda p: optimizer.state[p], 0.8, "here")
    for name, slopes in seen.items():
        weights = [0.8 ** (len(slopes) - 1 - i) for i in range(len(slopes))]
        wanted = sum(w * g.square() for w, g in zip(weights, slopes)) / sum(weights) if slopes else 0 * learning[name]
        torch.testing.assert_close(found.diagonal[name], wanted.detach(), rtol=1e-12, atol=0)
    assert found.estimator == "adam"


def test_the_file_of_a_checkpoint_is_the_live_optimizer(tmp_path):
    made = train([], tmp_path, save_strategy="steps", save_steps=4, **SLOW)
    live = moments.second_moments(made.model, made._moments, 0.9, "here")
    read = moments.from_file(tmp_path / "checkpoint-4" / "optimizer.pt", made.model, "here")
    assert live.diagonal.keys() == read.diagonal.keys() == params.trainable(made.model).keys()
    assert all(torch.equal(live.diagonal[n], read.diagonal[n]) for n in live.diagonal)
    assert live.total() > 0


def test_mistakes_are_one_line(tmp_path):
    model = family_model("llama")
    lora = LoRA(r=2).prepare_model(family_model("llama"), Run(directory=None, say=lambda line: None))
    momentum = {"momentum_buffer": torch.ones(1)}
    (tmp_path / "bad.pt").write_text("no pickle")
    optimizer = torch.optim.Adam(list(model.parameters())[:3])
    torch.save(optimizer.state_dict(), tmp_path / "few.pt")
    torch.save(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), tmp_path / "sgd.pt")
    for call, text in (
        (lambda: moments.second_moments(lora, lambda p: {}, 0.9, "here"), "no effect with LoRA"),
        (lambda: moments.second_moments(model, lambda p: momentum, 0.9, "here"), "momentum_buffer, no `exp_avg_sq`"),
        (lambda: moments.second_moments(model, lambda p: {}, 0.9, "here"), "has made no step"),
        (lambda: moments.from_file(tmp_path / "bad.pt", model, "here"), "not the state of an Adam optimizer"),
        (lambda: moments.from_file(tmp_path / "sgd.pt", model, "here"), "not the state of an Adam optimizer"),
        (lambda: moments.from_file(tmp_path / "few.pt", model, "here"), "made on other weights"),
    ):
        with pytest.raises(ConfigError, match=f"^here: .*{text}") as caught:
            call()
        assert "\n" not in str(caught.value)
