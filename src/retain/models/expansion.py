"""New decoder blocks between those of a model, which change nothing until they learn.

The configuration goes with the blocks: it says how many there are, of which kind each is, and which were added by
which task (`added_blocks`), so that `save_pretrained` and `from_pretrained` give the same model back.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from retain.errors import ModelError
from retain.models import params, structure

MARK = "added_blocks"  # in the configuration: per block, the number of the task that added it, 0 for the model's own


def marks(model: Any) -> list[int]:
    """Per block, bottom first: the task that added it, 0 for the model's own."""
    found = getattr(_config(model), MARK, None)
    return list(found) if found else [0] * len(params.decoder_layers(model))


def places(marks: list[int], count: int) -> list[int]:
    """Where `count` blocks go, spread evenly over the model's own: indices of today's blocks before which they stand.

    The last one is on top of all, as in LLaMA-Pro. One that was added earlier stays below a new one at its place.
    """
    own = [i for i, mark in enumerate(marks) if mark == 0]
    ends = [(k + 1) * len(own) // count for k in range(count)]
    return [own[end] if end < len(own) else len(marks) for end in ends]


def expand(model: Any, count: int) -> list[torch.nn.Module]:
    """Insert copies of blocks that write nothing, each above the block it is a copy of.

    Returns:
        The new blocks, bottom first. They are marked with the next number.

    Raises:
        ModelError: a block of this architecture cannot be made to change nothing, or depends on its number in a
            way that the configuration cannot say.
    """
    whole, config = params.causal(model), _config(model)
    real = not next(whole.parameters()).is_meta  # there is nothing to compare without weights
    before = structure.predict(model) if real else None
    layers, were, built = params.decoder_layers(model), marks(model), structure.blocks(model)
    numbers = _numbers(layers)
    shared = {id(c): c for c in (whole.config, config)}
    mine, new = max(were) + 1, []
    for place in reversed(places(were, count)):
        source = built[place - 1]
        silent = {id(m) for m in source.writers()}
        block = copy.deepcopy(source.layer, dict(shared))
        for old, fresh in zip(source.layer.modules(), block.modules()):
            if id(old) in silent:
                _silence(fresh)
        layers.insert(place, block)
        new.append(block)
        were.insert(place, mine)
        _stretch(config, place)
    config.num_hidden_layers = len(layers)
    setattr(config, MARK, were)
    for index, layer in enumerate(layers):
        for name in numbers:
            path, _, key = name.rpartition(".")
            setattr(layer.get_submodule(path), key, index)
    _check_rebuilt(whole, layers)
    if before is not None:
        change = float((structure.predict(model) - before).abs().max())
        if not change <= 1e-6 * float(before.abs().max()):
            raise ModelError(
                f"model: new blocks of zero change the outputs of {type(whole).__name__} by {change:.3g}, so it would "
                "not start from what it could do. Use `lora` or `bottleneck` with this architecture."
            )
    return new[::-1]


def newest(model: Any) -> list[torch.nn.Module]:
    """The blocks that were added last; none when none were."""
    were = marks(model)
    return [layer for layer, mark in zip(params.decoder_layers(model), were) if mark and mark == max(were)]


def _config(model: Any) -> Any:
    return params.causal(model).config.get_text_config(decoder=True)


def _stretch(config: Any, place: int) -> None:
    """Give a new block the entry of the one below it in every list that has one per block."""
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if key != MARK and "layer" in key and isinstance(value, list | tuple) and len(value) == count:
            longer = [*value[:place], value[place - 1], *value[place:]]
            vars(config)[key] = type(value)(longer)
    vars(config)[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count + 1


@torch.no_grad()
def _silence(module: torch.nn.Module) -> None:
    """Set weights and biases so that the module gives 0."""
    for parameter in module.parameters():
        parameter.zero_()
    weight: Any = getattr(module, "weight", None)
    if structure.is_linear(module) or weight.is_meta:
        return
    if bool(module(torch.linspace(-1, 1, weight.shape[-1]).to(weight)).any()):
        weight.fill_(-1)  # some norms scale by 1 + weight


def _numbers(layers: torch.nn.ModuleList) -> list[str]:
    """Attributes in which each block holds its own number, by which it finds its part of the cache."""
    facts = [_facts(layer) for layer in layers]
    named = [name for name in facts[0] if "layer" in name.rpartition(".")[2]]
    return [name for name in named if all(type(f.get(name)) is int and f[name] == i for i, f in enumerate(facts))]


def _check_rebuilt(whole: Any, layers: torch.nn.ModuleList) -> None:
    """Compare the blocks with those that would be built from the configuration alone."""
    try:
        config = type(whole.config).from_dict(whole.config.to_dict())
        config._attn_implementation = whole.config._attn_implementation
        with torch.device("meta"):
            rebuilt = params.decoder_layers(type(whole)(config))
    except Exception as error:  # whatever an architecture says to settings that do not fit together
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelError(
            f"model: with more blocks {type(whole).__name__} could not be opened again ({reason}). Use `lora` or "
            "`bottleneck` with it."
        ) from error
    if len(rebuilt) != len(layers):
        raise ModelError(f"model: {type(whole).__name__} does not take the number of its blocks from its settings.")
    for index, (block, other) in enumerate(zip(layers, rebuilt)):
        here, there = _facts(block), _facts(other)
        for name in here.keys() & there.keys():
            if here[name] != there[name]:
                raise ModelError(
                    f"model: in {type(whole).__name__} '{name}' depends on a block's number: block {index} has "
                    f"{here[name]} and would have {there[name]} when the model is opened again. Use `lora` or "
                    "`bottleneck` with it."
                )


def _facts(block: torch.nn.Module) -> dict[str, Any]:
    """Plain attributes of all modules of a block, and shapes of its weights."""
    found: dict[str, Any] = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for path, module in block.named_modules():
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and not key.startswith("_") and key not in ("training", "gradient_checkpointing"):
                found[f"{path}.{key}".lstrip(".")] = value
    return found
