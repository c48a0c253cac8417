"""The published rules once more, in plain fp64 on one vector of parameters: each a function from θ to a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from problems import Batch, generator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Rule = Callable[[Tensor, Batch, Batch, int], Tensor]
"""From θ, the batch, the auxiliary batch and the update's number to the gradient that SGD descends."""

LEARNING_RATE = 0.1


class Plain:
    """The losses of a network as functions of a vector of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        self.is_matrix = self.of_tensors(lambda t: torch.full_like(t, float(t.dim() >= 2)), self.start).bool()

    def tensors(self, theta: Tensor) -> list[Tensor]:
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes.values(), strict=True)]

    def of_tensors(self, function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
        """A function of each tensor, as a vector again."""
        found = [function(*parts) for parts in zip(*map(self.tensors, vectors), strict=True)]
        return torch.cat([t.reshape(-1) for t in found])

    def loss(self, theta: Tensor, data: Batch) -> Tensor:
        named = dict(zip(self.shapes, self.tensors(theta), strict=True))
        return cross_entropy(functional_call(self.model, named, (data.x,)), data.y)

    def group_losses(self, theta: Tensor, data: Batch) -> list[Tensor]:
        rows = {k: data.rows(k) for k in dict.fromkeys(data.groups)}
        return [self.loss(theta, Batch(data.x[own], data.y[own], (k,) * len(own))) for k, own in rows.items()]

    def gradient(self, theta: Tensor, data: Batch) -> Tensor:
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(theta, data), theta)[0]

    def hessian(self, theta: Tensor, data: Batch) -> Tensor:
        return torch.autograd.functional.hessian(lambda t: self.loss(t, data), theta)

    def normal(self, seed: int) -> Tensor:
        draws = generator(seed)
        return self.of_tensors(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=draws), self.start)


def hat(v: Tensor) -> Tensor:
    return v / v.norm()


def sam(w: Plain, rho: float) -> Rule:
    return lambda theta, data, *_: w.gradient(theta + rho * hat(w.gradient(theta, data)), data)


def asam_direction(theta: Tensor, g: Tensor, eta: float) -> Tensor:
    t = theta.abs() + eta
    return t**2 * g / (t * g).norm()


def asam(w: Plain, rho: float, eta: float, scaled: str = "all") -> Rule:
    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        t = theta.abs() + eta
        t = torch.where(w.is_matrix, t, 1.0) if scaled == "matrices" else t
        g = w.gradient(theta, data)
        return w.gradient(theta + rho * t**2 * g / (t * g).norm(), data)

    return rule


def gsam(w: Plain, rho: float, alpha: float) -> Rule:
    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        g, g_p = w.gradient(theta, data), sam(w, rho)(theta, data, data, 0)
        return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)

    return rule


def gam(w: Plain, rho: float, norm_rho: float, alpha: float) -> Rule:
    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        g0 = w.gradient(theta, data)
        g1 = w.gradient(theta + rho * hat(g0), data)
        theta2 = theta + norm_rho * hat(g1 - g0)
        g2 = w.gradient(theta2, data)
        g3 = w.gradient(theta2 + rho * hat(g2), data)
        p, q = g0 + g2, g1 + g3
        return q - alpha * (p - (p @ q) / (q @ q) * q)

    return rule


def sagm(w: Plain, rho: float, alpha: float) -> Rule:
    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        g = w.gradient(theta, data)
        return (g + w.gradient(theta + (rho / g.norm() - alpha) * g, data)) / 2

    return rule


def disam(w: Plain, rho: float, variance_weight: float, variance: str = "groups") -> Rule:
    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        moving = theta.detach().requires_grad_()
        losses = torch.stack(w.group_losses(moving, data))
        if variance == "groups":
            spread = losses.var(correction=0)
        else:
            shares = torch.tensor([len(data.rows(k)) for k in dict.fromkeys(data.groups)]) / len(data.groups)
            spread = (shares * (losses - (shares * losses).sum()) ** 2).sum()
        (g,) = torch.autograd.grad(w.loss(moving, data) - variance_weight * spread, moving)
        return w.gradient(theta + rho * hat(g), data)

    return rule


def friendly_sam(w: Plain, rho: float, decay: float, sigma: float) -> Rule:
    means: list[Tensor] = []

    def rule(theta: Tensor, data: Batch, *_: Any) -> Tensor:
        g = w.gradient(theta, data)
        means.append(decay * means[-1] + (1 - decay) * g if means else g)
        return w.gradient(theta + rho * hat(g - sigma * means[-1] if len(means) > 1 else g), data)

    return rule


def vasso(w: Plain, rho: float, theta: float) -> Rule:
    means: list[Tensor] = []

    def rule(at: Tensor, data: Batch, *_: Any) -> Tensor:
        g = w.gradient(at, data)
        means.append((1 - theta) * means[-1] + theta * g if means else g)
        return w.gradient(at + rho * hat(means[-1]), data)

    return rule


def look_sam(w: Plain, rho: float, alpha: float, interval: int) -> Rule:
    kept: list[Tensor] = []

    def rule(theta: Tensor, data: Batch, _: Batch, number: int) -> Tensor:
        g = w.gradient(theta, data)
        if number % interval == 0:
            g_s = sam(w, rho)(theta, data, data, 0)
            kept.append(g_s - (g_s @ g) / (g @ g) * g)
            return g_s
        return g + alpha * g.norm() * hat(kept[-1])

    return rule


def align(w: Plain, rho: float, trade_off: float, eta: float | None = None) -> Rule:
    def direction(theta: Tensor, g: Tensor) -> Tensor:
        return hat(g) if eta is None else asam_direction(theta, g, eta)

    def rule(theta: Tensor, data: Batch, auxiliary: Batch, _: int) -> Tensor:
        g_a = w.gradient(theta, auxiliary)
        g_a = w.gradient(theta + rho * direction(theta, g_a), auxiliary)
        g_t = w.gradient(theta, data)
        return w.gradient(theta + rho * (trade_off * direction(theta, g_t) - direction(theta, g_a)), data)

    return rule


class Eigenvector:
    """Power iteration with the whole Hessian, refreshed at an interval."""

    def __init__(self, w: Plain, interval: int, iterations: int) -> None:
        self.w, self.interval, self.iterations = w, interval, iterations
        self.v: Tensor | None = None
        self.shift = 0.0

    def __call__(self, theta: Tensor, data: Batch, number: int) -> Tensor:
        if number % self.interval == 0:
            hessian = self.w.hessian(theta, data)
            v = hat(self.w.normal(number) if self.v is None else self.v)
            for _ in range(self.iterations):
                if v @ hessian @ v < 0:
                    self.shift = max(self.shift, (hessian @ v).norm().item())
                v = hat(hessian @ v + self.shift * v)
            self.v = v
        assert self.v is not None
        return self.v


def x_sam(w: Plain, rho: float, alpha: float, interval: int, iterations: int, variant: str = "invariant") -> Rule:
    leading = Eigenvector(w, interval, iterations)

    def rule(theta: Tensor, data: Batch, _: Batch, number: int) -> Tensor:
        g_p, v = sam(w, rho)(theta, data, data, 0), leading(theta, data, number)
        if variant == "invariant":
            return g_p - alpha * (g_p @ v) * v
        return hat(g_p) - alpha * (g_p @ v).sign() * (g_p @ v) * v

    return rule


def eigen_sam(w: Plain, rho: float, alpha: float, interval: int, iterations: int) -> Rule:
    leading = Eigenvector(w, interval, iterations)

    def rule(theta: Tensor, data: Batch, _: Batch, number: int) -> Tensor:
        g, v = hat(w.gradient(theta, data)), leading(theta, data, number)
        return w.gradient(theta + rho * (g + alpha * (g @ v).sign() * (v - (v @ g) * g)), data)

    return rule


def sage(
    w: Plain, rho: float, gamma: float = 0.0, *, polar: bool = True, scale: bool = True, perturbs: bool = True
) -> Rule:
    """SAGE, its ablations, and GGA-L, which does not perturb."""

    def step_of(p: Tensor, g: Tensor) -> Tensor:
        if g.dim() < 2:
            return rho * hat(g)
        direction = g / g.norm()
        if polar:
            u, s, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
            rank = int((s > 1e-12 * s[0]).sum())
            direction = (u[:, :rank] @ vh[:rank]).view(g.shape)
        return rho * (p.norm() if scale else 1.0) * direction

    def rule(theta: Tensor, data: Batch, _: Batch, number: int) -> Tensor:
        moving = theta.detach().requires_grad_()
        own = [hat(torch.autograd.grad(loss, moving)[0]) for loss in w.group_losses(moving, data)]
        pairs = [own[i] @ own[j] for i in range(len(own)) for j in range(i)]
        beta = gamma * (1 - sum(pairs) / len(pairs))
        epsilon = w.of_tensors(step_of, theta, w.gradient(theta, data)) if perturbs else 0.0
        return w.gradient(theta + epsilon, data) + beta * w.normal(number)

    return rule


def sgld(w: Plain, temperature: float) -> Rule:
    def rule(theta: Tensor, data: Batch, _: Batch, number: int) -> Tensor:
        return w.gradient(theta, data) + math.sqrt(2 * temperature / LEARNING_RATE) * w.normal(number)

    return rule
