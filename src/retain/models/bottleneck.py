"""Serial bottleneck adapters on a model: put on, taken off, written and read.

PEFT has none (its adapters change linear layers, or run beside the model), so they are small modules of our own,
called by a hook on the module whose output they change. They hold parameters, not linear layers, which PEFT would
adapt as well. They cannot be merged into the weights, as they are not linear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retain.errors import RunError
from retain.functional.bottleneck import bottleneck
from retain.models import params, structure

NAME = "bottleneck"  # of the submodule at a site, and of the folder on disk
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


class Adapter(torch.nn.Module):
    """x + W_up relu(W_down x + b) + b at one site. W_up and its bias begin at 0: nothing changes."""

    def __init__(self, down: torch.Tensor) -> None:
        super().__init__()
        inner, width = down.shape
        self.down = torch.nn.Parameter(down)
        self.down_bias = torch.nn.Parameter(down.new_zeros(inner))
        self.up = torch.nn.Parameter(down.new_zeros(width, inner))
        self.up_bias = torch.nn.Parameter(down.new_zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bottleneck(x, self.down, self.down_bias, self.up, self.up_bias)


def add(model: Any, reduction: float, attention: bool, seed: int) -> int:
    """A new adapter at every site, after those that are there.

    Args:
        reduction: width of the stream over inner width.
        attention: also after attention, not after the feed-forward part alone.
        seed: of W_down, uniform in ±1/√d.

    Returns:
        Its number, counted from 0.
    """
    number = count(model)
    width = params.causal(model).config.get_text_config(decoder=True).hidden_size
    inner = max(1, round(width / reduction))
    generator = torch.Generator().manual_seed(seed)
    with detached(model):  # else the adapters there would be taken for parts of the blocks
        found = [(block.layer, block.sites()) for block in structure.blocks(model)]
    for layer, (after_attention, after_feed_forward) in found:
        like = next(layer.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)  # small steps vanish in half precision
        for site in [after_attention, after_feed_forward] if attention else [after_feed_forward]:
            down = (torch.rand(inner, width, generator=generator) * 2 - 1) / math.sqrt(width)
            _chain(site).append(Adapter(down.to(like.device, dtype)))
    return number


def sites(model: Any) -> dict[str, torch.nn.Module]:
    """Modules that have adapters, by name."""
    return {name: m for name, m in params.causal(model).named_modules() if _hooked(m)}


def count(model: Any) -> int:
    """Adapters one after the other, at most."""
    return max((len(site.get_submodule(NAME)) for site in sites(model).values()), default=0)  # type: ignore[arg-type]


def weights(model: Any, number: int | None = None) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter, or of all, by their names in the model."""
    mark = f".{NAME}." if number is None else f".{NAME}.{number}."
    return {name: p for name, p in params.causal(model).named_parameters() if mark in name}


def detach(model: Any) -> dict[str, torch.nn.Sequential]:
    """Take all adapters off; what is left is the base, bit for bit. Gives them back by site, for `attach`."""
    taken = {}
    for name, site in sites(model).items():
        taken[name] = site._modules.pop(NAME)
        for key in [k for k, hook in site._forward_hooks.items() if hook is _through]:
            del site._forward_hooks[key]
    return taken  # type: ignore[return-value]


def attach(model: Any, chains: dict[str, torch.nn.Sequential]) -> None:
    """Put adapters on that `detach` took off."""
    for name, chain in chains.items():
        _chain(params.causal(model).get_submodule(name)).extend(chain)


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """The base without its adapters for a block."""
    taken = detach(model)
    try:
        yield
    finally:
        attach(model, taken)


def save(model: Any, folder: Path, number: int | None = None) -> None:
    """Write one adapter, or all, into a folder, which is made."""
    found = weights(model, number)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: params.local(p).detach().cpu().contiguous() for name, p in found.items()}, folder / WEIGHTS)
    about = {
        "kind": "serial bottleneck adapter",
        "map": "x + up relu(down x + down_bias) + up_bias on the output of each site",
        "sites": sorted({name.partition(f".{NAME}.")[0] for name in found}),
        "parameters": sum(p.numel() for p in found.values()),
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load(model: Any, folder: Path) -> None:
    """Put what `save` wrote on a model: in place of an adapter of the same number, otherwise after those there.

    Raises:
        RunError: the file is damaged, or belongs to another architecture.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}). Train that task again.") from error
    whole = params.causal(model)
    places = sorted({name.rpartition(".")[0] for name in tensors}, key=lambda place: int(place.rpartition(".")[2]))
    for place in places:
        name, _, number = place.partition(f".{NAME}.")
        try:
            site = whole.get_submodule(name)
        except AttributeError:
            raise RunError(
                f"{path}: '{name}' is no part of {type(whole).__name__}. Give the model it is for."
            ) from None
        chain, like = _chain(site), next(whole.parameters())
        if int(number) > len(chain):
            raise RunError(f"{path}: adapter {number} of '{name}' stands on earlier ones, which are missing.")
        made = Adapter(tensors[f"{place}.down"].to(like.device))
        made.load_state_dict({key: tensors[f"{place}.{key}"] for key in made.state_dict()})
        if int(number) < len(chain):
            chain[int(number)] = made
        else:
            chain.append(made)


def _hooked(module: torch.nn.Module) -> bool:
    return any(hook is _through for hook in module._forward_hooks.values())


def _chain(site: torch.nn.Module) -> torch.nn.Sequential:
    """The adapters of a site, the first task's first; made where there are none."""
    if not _hooked(site):
        site.add_module(NAME, torch.nn.Sequential())
        site.register_forward_hook(_through)
    return site.get_submodule(NAME)  # type: ignore[return-value]


def _through(site: torch.nn.Module, args: Any, output: Any) -> Any:
    # found through the site, so that copies of the model and swapped parameters are followed
    chain = site.get_submodule(NAME)
    return (chain(output[0]), *output[1:]) if isinstance(output, tuple) else chain(output)
