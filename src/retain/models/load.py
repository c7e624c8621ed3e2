"""Open a model and its tokenizer: the starter, a local folder, a LoRA adapter, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.config import STARTER, ModelConfig
from retain.errors import ModelError, RetainError, RunError
from retain.models import hub
from retain.models.starter import starter_directory


def resolve(name: str) -> str:
    """The folder or hub id behind a name."""
    return str(starter_directory()) if name == STARTER else name


def adapter_base(file: Path) -> str:
    """The model that an adapter is for, out of its adapter_config.json.

    Raises:
        ModelError: it does not say.
    """
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{file}: does not say what the adapter is for ({_reason(error)}). Copy it again, or set its "
            "base_model_name_or_path to a folder or a hub id."
        ) from error


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a padding token.

    Raises:
        ModelError: no such model, or it has none.
    """
    where = resolve(name)
    hub.require(where, revision)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        bare = Path(where).is_dir() and not any(Path(where).glob("*token*")) and not any(Path(where).glob("vocab*"))
        reason = "its folder has none" if bare else _reason(error)
        raise ModelError(
            f"model.name: no tokenizer for '{name}' ({reason}). "
            "A model's folder needs config.json, tokenizer.json and tokenizer_config.json, each whole."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def known_context(settings: Any, tokenizer: Any) -> int | None:
    """Longest input in tokens, from the config of a language model, else from its tokenizer; None where neither says.

    Args:
        settings: of `transformers`, of the text part of a model for text and images.
    """
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "seq_length", "max_sequence_length"):
        length = getattr(settings, name, None)
        if isinstance(length, int) and length > 0:
            return length
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length and length < 10**9 else None


def load_settings(config: ModelConfig) -> Any:
    """The `transformers` configuration of a model, or of the base of an adapter; no weights are read.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    where = resolve(config.name)
    try:
        while (adapter := Path(where) / "adapter_config.json").is_file():  # it will be merged
            where = resolve(json.loads(adapter.read_text())["base_model_name_or_path"])
        return AutoConfig.from_pretrained(where, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.name: no configuration of '{config.name}' ({_reason(error)}). Give '{STARTER}', a folder with "
            "config.json, or a hub id that is reachable."
        ) from error


def load_model(config: ModelConfig | str, tokenizer: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 unless the configuration says otherwise; adapters are merged, bottlenecks put on.

    Without `tokenizer` none is loaded and None is returned for it.

    Raises:
        ModelError: no such model, weights that are damaged, no tokenizer, no quantisation library, or an adapter that
            is to be quantised or whose base cannot be opened.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(config, str):
        config = ModelConfig(name=config)
    where = resolve(config.name)
    adapter = Path(where) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        if config.quantize != "none":
            raise ModelError(
                f"model.name: '{config.name}' is an adapter, which cannot be merged into a quantised base without "
                "loss. Give a model into which it is merged, or set `quantize: none`."
            )
        base_name = adapter_base(adapter)
        try:
            base, words = load_model(config.model_copy(update={"name": base_name}), tokenizer)
        except ModelError as error:
            raise ModelError(f"{adapter}, base_model_name_or_path: {error}") from error
        with _readable(f"model.name: cannot open '{config.name}'", Path(where), ModelError, hub.ALLOWED):
            return settled(PeftModel.from_pretrained(base, where, is_trainable=True)), words
    hub.require(where, config.revision)
    words = load_tokenizer(config.name, config.revision, config.trust_remote_code) if tokenizer else None
    extra: dict[str, Any] = {}
    if config.quantize != "none":
        extra["quantization_config"] = _quantisation(config.quantize)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with _readable(f"model.name: cannot open '{config.name}'", Path(where), ModelError, hub.ALLOWED):
        model = AutoModelForCausalLM.from_pretrained(
            where,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **extra,
        )
    if config.quantize == "4bit":
        _right_on_cpu(model)
    _put_on(model, Path(where))
    return model, words


def _put_on(model: Any, folder: Path) -> None:
    """Bottleneck adapters that lie in a model's or a task's folder."""
    from retain.models import bottleneck

    if (folder / bottleneck.NAME).is_dir():
        bottleneck.load(model, folder / bottleneck.NAME)


def _right_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from silently wrong numbers with 4-bit weights on a CPU.

    Raises:
        ModelError: a layer's input is not whole blocks of 64, which its AVX-512 code reads with wrong scales.
    """
    import bitsandbytes

    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        if module.weight.device.type == "cpu" and module.in_features % 64:
            raise ModelError(
                f"model.quantize: '4bit' on a CPU needs layer inputs in multiples of 64; {name} has "
                f"{module.in_features}. Set `quantize: 8bit` or `none`, or use a GPU."
            )
        # else the first evaluation, on processors with bfloat16, would store the weight anew, rounded once more,
        # in a form through which no gradient flows, and leave it so for the training
        module.support_avx512bf16_for_cpu = False


def _quantisation(kind: str) -> Any:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantize: '{kind}' needs bitsandbytes. Install it with `pip install 'retain-llm[qlora]'`, "
            "or set `quantize: none`."
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@contextmanager
def _readable(what: str, folder: Path, kind: type[RetainError], advice: str) -> Iterator[None]:
    """Make one line of whatever a library raises on a model's files: each format has errors of its own.

    Raises:
        RetainError: of the given kind: `what`, the file that is damaged where that can be told, and `advice`.
    """
    import torch

    try:
        yield
    except (RetainError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(f"{what} ({_why(error, folder)}). {advice}") from error


def _again(part: Path) -> str:
    return f"Delete {part.parent} and run the same command again: that task is then learned anew."


def _why(error: Exception, folder: Path) -> str:
    damaged = _damaged(folder)
    return f"{damaged.name} is damaged: {_reason(error)}" if damaged else _reason(error)


def _damaged(folder: Path) -> Path | None:
    """The first file of weights in a folder that is cut short or no such file."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    return None


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than config.json says"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def load_stage(config: ModelConfig, tasks: list[Path], merged: bool = False, device: str | None = None) -> Any:
    """The model after a sequence of finished tasks, given their folders (each with the `parts` that were written).

    Adapters are merged in order, exactly as while training (`settled`); with `merged` also where the base is
    quantised, whose weights become ordinary ones of the same values first. They are merged on `device`, as the last
    bits of a product depend on it: a run that goes on gives the one on which it trains. A quantised model stays where
    it was loaded.

    Raises:
        ModelError: as `load_model`.
        RunError: what a task left is damaged, or was deleted.
    """
    from peft import PeftModel

    if config.quantize != "none":
        tasks = tasks[-1:]  # one adapter learned all of them
    full = [i for i, folder in enumerate(tasks) if (folder / "model").is_dir()]
    first = full[-1] if full else -1
    for folder in tasks[max(first, 0) :]:
        _require_parts(folder)
    if full:
        whole = tasks[first] / "model"
        try:
            model, _ = load_model(config.model_copy(update={"name": str(whole)}), tokenizer=False)
        except ModelError as error:
            if not isinstance(error.__cause__, Exception):
                raise
            raise RunError(f"{whole}: cannot be opened ({_why(error.__cause__, whole)}). {_again(whole)}") from error
    else:
        model, _ = load_model(config, tokenizer=False)
    if merged and getattr(model, "is_quantized", False):
        model = model.dequantize()
    if getattr(model, "is_quantized", False):
        device = None
    model = model if device is None else model.to(device)
    for folder in tasks[max(first, 0) :]:
        if (folder / "adapter").is_dir():
            adapter = folder / "adapter"
            with _readable(f"{adapter}: cannot be opened", adapter, RunError, _again(adapter)):
                model = settled(PeftModel.from_pretrained(model, str(adapter), is_trainable=True))
        _put_on(model, folder)
    return model if device is None else model.to(device)


def _require_parts(folder: Path) -> None:
    """Refuse a finished task whose weights are gone: without them the model would silently be the one before it."""
    mark = folder / "done.json"
    kinds = json.loads(mark.read_text(encoding="utf-8")).get("kind", "").split("+") if mark.is_file() else []
    if gone := [kind for kind in kinds if kind and not (folder / kind).is_dir()]:
        raise RunError(
            f"{folder}: the weights of this task were deleted ({', '.join(gone)}). {_again(folder / gone[0])}"
        )


def parts(model: Any) -> dict[str, Callable[[Path], Any]]:
    """What is written of a model after a task, by folder: a PEFT `adapter` or the whole `model`, and `bottleneck`."""
    from retain.models import bottleneck, params

    own = bottleneck.count(model)
    if not own:
        return {"adapter" if hasattr(model, "peft_config") else "model": model.save_pretrained}
    last = {bottleneck.NAME: lambda folder: bottleneck.save(model, folder, own - 1)}
    if hasattr(model, "peft_config"):
        return {"adapter": model.save_pretrained} | last
    if params.trainable(model).keys() <= bottleneck.weights(model).keys():
        return dict(last)  # the base has not moved
    return {"model": lambda folder: save_base(model, folder), bottleneck.NAME: lambda f: bottleneck.save(model, f)}


def save_base(model: Any, folder: Path | str) -> None:
    """Write a model's folder, without bottleneck adapters."""
    from retain.models import bottleneck

    with bottleneck.detached(model):
        model.save_pretrained(folder)


def settled(model: Any) -> Any:
    """A model after a task, adapters merged: what is probed, deployed, and learned on by the next task.

    A quantised base cannot be merged without loss, so there the adapter stays on top and goes on learning.
    """
    if not hasattr(model, "peft_config"):
        return model if getattr(model, "is_quantized", False) else model.requires_grad_(True)
    if getattr(model.get_base_model(), "is_quantized", False):
        return model
    # trainable again, as after loading; autocast also keeps its copies of such weights between forward passes
    return model.merge_and_unload().requires_grad_(True)
