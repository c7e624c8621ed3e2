"""Train with a monitor and go on from the newest checkpoint. Arguments: output folder, probe file."""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from monitor_kit import TEXTS, host
from training_kit import stored
from transformers.trainer_utils import get_last_checkpoint

from retain.training.monitor import ForgettingMonitor

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    monitor = ForgettingMonitor(every=2, probes_every=2, probes=[sys.argv[2]], anchors=TEXTS, checkpoint=True)
    made = host("sft", folder, [monitor], max_steps=14, learning_rate=1e-2)
    print("BEGIN", flush=True)
    made.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    save_file({k: v.contiguous() for k, v in stored(made.model).items()}, folder / "end.safetensors")
