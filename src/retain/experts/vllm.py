"""Experts for vLLM: folders that its multi-LoRA takes, and the command that serves them.

The rules are those of vLLM's `vllm/config/lora.py` and `vllm/lora/peft_helper.py` (v0.22) and of its page "LoRA
Adapters": one scale alpha/r per adapter, factors of linear layers alone, and a largest rank out of a list.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.errors import ConfigError, ModelError
from retain.experts.adapter import CONFIG, WEIGHTS, settings
from retain.experts.library import ExpertLibrary
from retain.results import write_text

#: What --max-lora-rank may be, apart from 1, which older versions do not know.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Experts in one batch: each takes memory of the GPU for the largest rank on every layer.
AT_ONCE = 8
COMMAND = "serve.sh"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")


def check(folder: Path) -> int:
    """The rank for which vLLM must make room, when it takes the adapter.

    Raises:
        ModelError: it does not, with the reason and what to do.
    """
    from safetensors import SafetensorError, safe_open

    found, path = settings(folder), folder / CONFIG
    advice = "Write it as a model of its own instead (`retain merge`, or `retain export` for a run)."
    for key in ("rank_pattern", "alpha_pattern"):
        if found.get(key):
            raise ModelError(f"{path}: {key} is set, and vLLM has one rank and one scale per adapter. {advice}")
    if found.get("fan_in_fan_out"):
        raise ModelError(f"{path}: fan_in_fan_out is set, as for GPT-2, whose layers vLLM does not adapt. {advice}")
    if found.get("lora_bias"):
        raise ModelError(f"{path}: lora_bias is set, and vLLM takes factors alone. Train without it.")
    rank = int(found["r"])
    if rank > RANKS[-1]:
        raise ModelError(f"{path}: r {rank} given; vLLM takes up to {RANKS[-1]}. Train with a smaller rank.")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: damaged ({error}). Remove the expert and add it again.") from error
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} is no factor of a linear layer, which is all vLLM takes. {advice}"
            )
        if not re.search(r"\.\d+\.", match["module"]):
            raise ModelError(
                f"{folder / WEIGHTS}: {match['module']} is adapted, an embedding or a head, which vLLM takes for some "
                "models only. Train with `lora: {targets: all}`, which leaves it out."
            )
    return rank


def command(base: str, experts: Sequence[str], rank: int) -> list[str]:
    """The words of `vllm serve` for experts that lie in `adapters/`.

    Args:
        base: folder or hub id of the base.
        rank: the largest of the experts.
    """
    return [
        *("vllm", "serve", base, "--enable-lora"),
        *("--max-lora-rank", str(next(r for r in RANKS if r >= rank))),
        *("--max-loras", str(min(len(experts), AT_ONCE)), "--max-cpu-loras", str(len(experts))),
        *("--lora-modules", *(f"{name}=adapters/{name}" for name in experts)),
    ]


def export(library: ExpertLibrary, to: str | Path, names: Sequence[str] = ()) -> Path:
    """Write experts and the command that serves them, `serve.sh`.

    Args:
        to: a folder that is not there yet.
        names: all of the library when none are given.

    Returns:
        The command's file.

    Raises:
        ConfigError: the folder is there, there is no such expert, or none at all.
        ModelError: an expert that vLLM does not take; nothing is written then.
    """
    from retain.models.load import resolve

    target, names = Path(to), list(dict.fromkeys(names)) or library.names()
    if target.exists():
        raise ConfigError(f"{target}: exists already. Choose a new folder.")
    if not names:
        raise ConfigError(f"{library.folder}: no experts here. Add one first: `retain experts add`.")
    rank = max(check(library.path(name)) for name in names)
    base: Any = resolve(library.card(names[0]).base)
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in names:
            library.export(name, partial / "adapters" / name)
        write_text(partial / COMMAND, _script(command(base, names, rank)))
        (partial / COMMAND).chmod(0o755)
        about = {name: library.card(name).model_dump(mode="json", exclude={"training"}) for name in names}
        write_text(partial / "experts.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / COMMAND


def _script(words: list[str]) -> str:
    """A shell script; more options of vLLM may follow its name."""
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    lines = [shlex.join(words[:first])]
    for word in words[first:]:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    body = " \\\n  ".join(["exec " + lines[0], *lines[1:], '"$@"'])
    return (
        "#!/bin/sh\n"
        "# One base and its experts: a request's `model` names the expert, or the base for none of them.\n"
        f"# --max-loras is how many share a batch; --max-cpu-loras how many stay in the machine's memory.\n"
        f'cd "$(dirname "$0")" || exit 1\n{body}\n'
    )
