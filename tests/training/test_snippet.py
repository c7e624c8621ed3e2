"""The lines that a user adds to an own training script: a model that knows its folder brings its tokenizer along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, stored
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from retain import EWC, ContinualTrainer, Distill, Replay
from retain.errors import ModelError
from retain.models import params


@pytest.fixture
def args(tmp_path: Path) -> SFTConfig:
    """One step on the CPU."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return SFTConfig(
        str(tmp_path / "out"), max_steps=1, max_length=256, learning_rate=1e-2, logging_steps=1, **quiet
    )  # fmt: skip


@pytest.fixture(params=["loaded", "name"])
def model(request: pytest.FixtureRequest, tiny_folder: Path) -> Any:
    """What a user may give as `model`: a loaded one, which knows its folder, or the folder itself."""
    if request.param == "name":
        return str(tiny_folder)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert loaded.config._name_or_path == str(tiny_folder)
    return loaded


def check(trainer: ContinualTrainer, before: params.Tensors, folder: Path) -> None:
    """The model wrote the rows that were replayed, with the template of its folder, and something was learned."""
    assert trainer.processing_class.chat_template == (folder / "chat_template.jinja").read_text()
    buffer = Path(trainer.args.output_dir) / "buffer"
    written = Dataset.from_parquet(str(buffer / "self.parquet"), cache_dir=str(buffer / ".cache"))
    assert all(row["completion"][0]["content"] for row in written)
    new, replayed = trainer.rows_seen()
    assert replayed >= 1
    assert new + replayed == 8 * trainer.state.global_step
    after = stored(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_replay_and_distill(model: Any, args: SFTConfig, tiny_folder: Path) -> None:
    ds = rows(16)
    trainer = ContinualTrainer(
        model, args, train_dataset=ds, methods=[Replay(fraction=0.1), Distill(strength=0.5)]
    )  # fmt: skip
    before = stored(trainer.model)
    trainer.train()
    check(trainer, before, tiny_folder)
    assert losses(trainer)[0].keys() == {"loss/main", "loss/distill"}


def test_with_ewc(model: Any, args: SFTConfig, tiny_folder: Path) -> None:
    args.max_steps = 2  # at the first one nothing has moved that could be pulled back
    trainer = ContinualTrainer(
        model,
        args,
        train_dataset=rows(16),
        methods=[EWC(strength=0.5, samples=4), Replay(fraction=0.1), Distill(strength=0.5)],
    )
    before = stored(trainer.model)
    trainer.train()
    check(trainer, before, tiny_folder)
    first, second = losses(trainer)
    assert first["loss/ewc"] == 0
    assert second["loss/ewc"] > 0


def losses(trainer: ContinualTrainer) -> list[dict[str, float]]:
    """The terms of each step."""
    logged = [entry for entry in trainer.state.log_history if "loss/main" in entry]
    return [{name: value for name, value in entry.items() if name.startswith("loss/")} for entry in logged]


def test_a_model_without_a_name_needs_its_tokenizer(args: SFTConfig) -> None:
    with pytest.raises(ModelError, match="processing_class"):
        ContinualTrainer(tiny_model(tiny_tokenizer()), args, train_dataset=rows(4))
