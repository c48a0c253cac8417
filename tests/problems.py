"""Tiny networks and batches with known groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hf_sage.engine import Part

SIZES = {"photo": 5, "sketch": 3, "art": 2}
"""Unequal on purpose: sample weights are not uniform weights."""


@dataclass(frozen=True)
class Batch:
    """Images of 1×3×3, their labels, and the group of each row."""

    x: Tensor
    y: Tensor
    groups: tuple[str, ...]

    def rows(self, group: str) -> list[int]:
        return [i for i, g in enumerate(self.groups) if g == group]

    def permuted(self, seed: int = 1) -> Batch:
        order = torch.randperm(len(self.groups), generator=generator(seed)).tolist()
        return Batch(self.x[order], self.y[order], tuple(self.groups[i] for i in order))

    def renamed(self, names: dict[str, str]) -> Batch:
        return replace(self, groups=tuple(names[g] for g in self.groups))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def batch(dtype: torch.dtype = torch.float64, sizes: dict[str, int] = SIZES, seed: int = 0) -> Batch:
    """Rows of the groups in turn; the groups differ in the mean of their images."""
    groups = tuple(name for name, n in sizes.items() for _ in range(n))
    shift = torch.tensor([list(sizes).index(g) for g in groups], dtype=torch.float64).view(-1, 1, 1, 1)
    x = matrix(len(groups), 1, 3, 3, seed=seed) + shift
    return Batch(x.to(dtype), torch.randint(3, (len(groups),), generator=generator(seed)), groups)


class Scale(nn.Module):
    """A 0-dimensional parameter, like CLIP's logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Parameters of 4, 2, 1 and 0 dimensions; smooth, so that fp64 comparisons meet no kink."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3), Scale()).to(dtype)


def network_with(layer: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """An MLP with ``layer`` on its 8 hidden units."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), layer, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def concentric_circles() -> tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]:
    """The loss of a 2-64-2 ReLU network on two circles as a function of its parameters, and where Adam ends."""
    angle = torch.arange(200, dtype=torch.float64) * 2 * math.pi / 100
    y = torch.arange(200) // 100
    radius = (1 - 0.5 * y + 0.05 * matrix(200)).unsqueeze(1)
    x = radius * torch.stack([angle.cos(), angle.sin()], 1)

    def loss(theta: list[Tensor]) -> Tensor:
        w1, b1, w2, b2 = theta
        return cross_entropy((x @ w1.mT + b1).relu() @ w2.mT + b2, y)

    theta = [nn.Parameter(matrix(*shape) / 2) for shape in ((64, 2), (64,), (2, 64), (2,))]
    optimizer = torch.optim.Adam(theta, lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        loss(theta).backward()
        optimizer.step()
    return loss, [p.detach() for p in theta]


class Algorithm1:
    """Algorithm 1 of the paper, phase by phase, in plain fp64; with ``spectral=False`` SAM's ascent instead."""

    def __init__(self, model: nn.Module, data: Batch, rho: float, gamma: float, *, spectral: bool) -> None:
        theta = dict(model.named_parameters())
        logits = model(data.x)  # one pass over concat(x_1, ..., x_K)
        names = sorted(set(data.groups))
        losses = [cross_entropy(logits[data.rows(k)], data.y[data.rows(k)]) for k in names]
        g = [torch.autograd.grad(loss, list(theta.values()), retain_graph=True) for loss in losses]
        w = [len(data.rows(k)) / len(data.groups) for k in names]
        mean = [sum(w_k * g_k[i] for w_k, g_k in zip(w, g, strict=True)) for i in range(len(theta))]
        flat = [torch.cat([x.reshape(-1) for x in g_k]) for g_k in g]
        pairs = list(itertools.combinations(flat, 2))
        self.agreement = sum(a @ b / (a.norm() * b.norm()) for a, b in pairs) / len(pairs)
        self.beta = gamma * (1 - self.agreement)
        total = torch.cat([x.reshape(-1) for x in mean]).norm()

        def ascent(p: Tensor, g: Tensor) -> Tensor:
            if not spectral:
                return rho * g / total
            if g.dim() < 2:
                return rho * g / g.norm()
            u, s, vh = torch.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
            r = int((s > 1e-12 * s[0]).sum())  # a softmax head's gradient lacks one rank: UVᵀ is that of its range
            return rho * p.norm() * (u[:, :r] @ vh[:r]).reshape(g.shape)

        self.epsilon = [ascent(p.detach(), x) for p, x in zip(theta.values(), mean, strict=True)]
        moved = {n: (p + e).detach().requires_grad_() for (n, p), e in zip(theta.items(), self.epsilon, strict=True)}
        self.perturbed_loss = cross_entropy(functional_call(model, moved, data.x), data.y)
        self.gradient = torch.autograd.grad(self.perturbed_loss, list(moved.values()))
        self.loss, self.group_losses = cross_entropy(logits, data.y), dict(zip(names, losses, strict=True))


def parts_of(model: nn.Module, data: Batch, micro_batches: int = 1) -> list[Part]:
    """The batch as the engine takes it: cut into micro-batches of neighbouring rows, and these by group."""
    parts = []
    for rows in torch.arange(len(data.groups)).tensor_split(micro_batches):
        inside = set(rows.tolist())
        for group in dict.fromkeys(data.groups[i] for i in rows):
            own = [i for i in data.rows(group) if i in inside]
            parts.append(part(model, group, data.x[own], data.y[own], len(own) / len(data.groups)))
    return parts


def part(model: nn.Module, group: str, x: Tensor, y: Tensor, weight: float) -> Part:
    return Part(group, weight, lambda: weight * cross_entropy(model(x), y))


def values(model: nn.Module) -> list[Tensor]:
    """A copy of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor]:
    """A copy of the gradients of the parameters that have one."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collects the parameters' values at every forward pass of the whole network."""
    seen: list[list[Tensor]] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(values(model)))
    try:
        yield seen
    finally:
        handle.remove()


class Counter:
    """Counts rows that go through a network forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.backwards = 0
        model.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
