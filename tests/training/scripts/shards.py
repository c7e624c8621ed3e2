"""Pulls and interpolation on parameters sharded over two processes, against the same on whole ones.

Prints one line `case largest-difference` per case, on the main process.
"""

import copy
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tiny import tiny_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retain.methods import build
from retain.methods.context import Run
from retain.models import params
from retain.models.pull import Pull, product_keys


def lora(model, moved):
    """The model with adapters; `moved` gives B values other than zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if moved:
        for pair in params.lora_pairs(model).values():
            torch.nn.init.normal_(pair.B, std=0.1)
    return model


def shard(model, mesh):
    for layer in params.decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(params.causal(model), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in params.trainable(model).values())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def draw(tensor, number):
    """Random numbers for a tensor, the same on every process, placed as the tensor is."""
    generator = torch.Generator().manual_seed(number)
    return params.aligned(torch.randn(tuple(tensor.shape), generator=generator), tensor)


def importance_of(model, pairs):
    """Positive numbers by name, as a Fisher would be."""
    generator = torch.Generator().manual_seed(7)
    found = {name: torch.rand(p.shape, generator=generator) for name, p in params.outside_lora(model).items()}
    for name, pair in pairs.items():
        rows, columns = product_keys(name)
        found[rows] = torch.rand(pair.B.shape[0], generator=generator)
        found[columns] = torch.rand(pair.A.shape[1], generator=generator)
    return found


def act(model, anchor, importance, action):
    """Move the weights, set gradients, pull; the result by name, whole."""
    learning = params.trainable(model)
    pull = Pull(model, anchor, importance)
    with torch.no_grad():
        for number, parameter in enumerate(learning.values()):
            parameter.add_(draw(parameter, number), alpha=0.1)
            parameter.grad = draw(parameter, 1000 + number)
    if action == "gradient":
        pull.add_gradients(0.7)
        return {name: whole(p.grad) for name, p in learning.items()}
    if action == "proximal":
        pull.step(0.7, 0.1)
    elif action == "interpolate":
        method = build([{"interpolate": {"strength": 0.3}}])[0]
        method.finish_model(model, SimpleNamespace(start=anchor))
    elif action == "value":
        total = torch.tensor(pull.value(0.7))
        if any(isinstance(p, DTensor) for p in pull.dense):
            dist.all_reduce(total)
        return {"value": total}
    return {name: whole(p.detach()) for name, p in learning.items()}


def compare(name, one, other):
    assert one.keys() == other.keys()
    worst = max(float((one[k] - other[k]).abs().max() / (1 + one[k].abs().max())) for k in one)
    if dist.get_rank() == 0:
        print("CASE", name, worst, flush=True)


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    tokenizer = tiny_tokenizer()
    for kind in ("full", "lora", "moved-lora"):
        for weighing in ("l2sp", "ewc"):
            for action in ("gradient", "proximal", "interpolate", "value"):
                if kind == "moved-lora" and action == "interpolate":
                    continue  # refused: the product has no start at rank r
                if kind != "full" and action == "value":
                    continue
                plain = tiny_model(tokenizer)
                plain = plain if kind == "full" else lora(plain, kind == "moved-lora")
                sharded = copy.deepcopy(plain)
                anchor = params.snapshot(params.trainable(plain))
                importance = importance_of(plain, params.lora_pairs(plain)) if weighing == "ewc" else None
                shard(sharded, mesh)
                results = [act(model, anchor, importance, action) for model in (plain, sharded)]
                compare(f"{kind}/{weighing}/{action}", *results)
    snapshots()
    dist.destroy_process_group()


def snapshots():
    """Anchors taken of sharded parameters are the whole ones."""
    plain = tiny_model(tiny_tokenizer())
    sharded = copy.deepcopy(plain)
    shard(sharded, init_device_mesh("cpu", (2,)))
    one, other = (params.snapshot(params.trainable(m)) for m in (plain, sharded))
    compare("snapshot", one, {name: whole(t) for name, t in other.items()})
    run = Run(directory=None, say=lambda line: None)
    run.start = other
    with torch.no_grad():
        for model in (plain, sharded):
            for number, parameter in enumerate(params.trainable(model).values()):
                parameter.add_(draw(parameter, number), alpha=0.1)
    pulls = [Pull(plain, one), Pull(sharded, other)]
    for pull, model in zip(pulls, (plain, sharded)):
        for parameter in params.trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        pull.add_gradients(1.0)
    grads = [{n: whole(p.grad) for n, p in params.trainable(m).items()} for m in (plain, sharded)]
    compare("sharded-anchor", *grads)


if __name__ == "__main__":
    main()
