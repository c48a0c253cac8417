"""What two ranks train with the methods that ask the batch for more than two gradients, and one process too."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from methods_by_name import OPTIONS, options
from problems import batch
from rank_worker import Outcome
from rank_worker_training import rank, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import image_rows, vit

from hf_sage.engine import Part, two_pass_step
from hf_sage.methods import METHODS, Method


def case(name: str, _: Path | None = None, *, n: int = 1) -> Outcome:
    return trained(vit, image_rows, n=n, **options(name))


def asks_for_more(method: Method) -> bool:
    """Than SAM and SAGE, which have tests of their own."""
    tied = [rule for rule in (method.objective, method.hook, method.ascent) if rule is not None]
    return bool(method.needs - {"groups"} or any("groups" in rule.needs for rule in tied) or method.passes > 2)


OF_FEATURES = [name for name in METHODS if "features" in METHODS[name]().needs]


def own_gradient(name: str, seed: int) -> list[Tensor]:
    """Of a step on rows that no other rank has, which nothing is to be averaged with: plain torch, fp64."""
    torch.manual_seed(0)
    layers = {"body": nn.Linear(9, 5), "squash": nn.Tanh(), "classifier": nn.Linear(5, 3)}
    model, data = nn.Sequential(OrderedDict(layers)).double(), batch(seed=seed)

    def part(group: str) -> Part:
        x, y = data.x.flatten(1)[data.rows(group)], data.y[data.rows(group)]
        weight = len(y) / len(data.y)
        return Part(group, weight, lambda: weight * cross_entropy(model(x), y), y)

    two_pass_step(model, [part(group) for group in dict.fromkeys(data.groups)], METHODS[name](**OPTIONS.get(name, {})))
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def each_for_itself(name: str, _: Path) -> Outcome:
    return {"gradient": own_gradient(name, rank())}


TRAINED = {name: partial(case, name) for name in METHODS if asks_for_more(METHODS[name]())}
for name in OF_FEATURES:  # which meet in one place, from all micro-batches of one row a group
    TRAINED[f"{name}, 2 micro-batches"] = partial(case, name, n=2)
CASES = TRAINED | {f"{name}, each for itself": partial(each_for_itself, name) for name in OF_FEATURES}
