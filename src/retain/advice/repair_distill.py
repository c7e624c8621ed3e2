"""Short self-distillation: a fine-tune is taught by its own base, on rows that the base writes itself.

    L = CE(rows of the base) + KL(p⁰ ‖ p)         (Li & Hoiem 2016, arXiv:1606.09282, with self-written rows as in
                                                   arXiv:2406.08464)

No old data is needed and no new one: what was learned is only held by the shortness of the training. A LoRA adapter
learns it, on top of the tuned weights. Deviations from the papers: after the training on the new task, not with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retain.advice.repair_models import Both
from retain.advice.repair_moves import Candidate
from retain.models.own_rows import self_written

#: Up to so many parameters the training is on by default, with so many steps.
SMALL, STEPS = 500_000_000, 16
_BATCH, _RANK, _RATE, _LENGTH, _ANSWER = 8, 8, 3e-4, 160, 48


def default_steps(live: Any) -> int:
    """Steps where nothing is asked for: `STEPS` for a small model, none for others."""
    return STEPS if sum(p.numel() for p in live.parameters()) <= SMALL else 0


def distilled(
    both: Both,
    base: str,
    steps: int,
    folder: Path,
    seed: int = 0,
    avoid: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """The adapter, trained unless it is there; the live model is afterwards what it was made for, at any point.

    Args:
        base: folder or hub id of the teacher.
        steps: of the optimizer, of eight rows each.
        folder: for the rows and the adapter.
        avoid: texts that no row may repeat: those of the probes.

    Returns:
        The adapter's folder; it stands on the tuned model.

    Raises:
        DataError: the base wrote no row that can be used.
    """
    done = folder / "adapter"
    if done.is_dir():
        return done
    from transformers import PrinterCallback
    from trl import SFTConfig

    from retain.methods import build
    from retain.methods.context import Run
    from retain.training.arguments import complete
    from retain.training.trainer import ContinualTrainer
    from retain.training.watch import Bar

    words = both.tokenizers[1]
    rows = self_written(both.put(None), words, folder, 4 * steps, seed, say, _ANSWER, avoid=avoid)
    given = {
        "max_steps": steps, "learning_rate": _RATE, "per_device_train_batch_size": _BATCH, "max_length": _LENGTH,
        "save_strategy": "no",
    }  # fmt: skip
    own = {"output_dir": str(folder / "training"), "seed": seed, "disable_tqdm": True}
    methods = build(
        [{"lora": {"r": _RANK}}, {"distill": {"teacher": "frozen", "model": base, "rows": "all", "strength": 1.0}}]
    )
    bar = Bar("distilling")
    trainer = ContinualTrainer(
        both.put(Candidate("tuned", "tuned")),
        SFTConfig(**(complete(given, lora=True) | own)),
        train_dataset=rows,
        processing_class=words,
        methods=methods,
        run=Run(folder / "training", tokenizer=words, seed=seed, new_rows=rows, say=say),
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        bar.close()
    trainer.release()
    partial = folder / "adapter.part"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(str(partial))
    partial.rename(done)
    both.live = trainer.model.unload().eval().requires_grad_(True)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return done
