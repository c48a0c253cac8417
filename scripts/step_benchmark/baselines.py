"""What SAGE is compared to, written as plainly as one would on a first reading of the papers."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from step_benchmark.workload import Workload

MUON = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic (Jordan et al. 2024), those of ``torch.optim.Muon``."""


def muon_newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton–Schulz as ``torch.optim.Muon`` runs it, one matrix at a time, but in fp32 where that runs in bf16.

    X ← a X + (b A + c A²) X with A = X Xᵀ, on the smaller side of the matrix, from X = G/‖G‖_F.
    """
    a, b, c = MUON
    tall = g.shape[0] > g.shape[1]
    x = (g.mT if tall else g).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def erm_pass(work: Workload) -> None:
    """Forward and backward over the whole batch."""
    torch.autograd.backward(work.loss())


def naive_sage_pass(work: Workload, rho: float = 1e-6, gamma: float = 1e-6) -> None:
    """Algorithm 1 of the SAGE paper line by line; leaves the noisy perturbed gradient in ``.grad``.

    One forward over all groups, K backwards through its graph, all pairs of cosines, Newton–Schulz matrix by matrix,
    L2 for vectors, a copy of θ, a second forward and backward, θ again, noise.
    """
    parameters = work.parameters
    losses = work.group_losses()
    last = work.groups - 1
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=k < last) for k, loss in enumerate(losses)]
    flat = [torch.cat([g.flatten() for g in group]) for group in gradients]
    agreement = torch.stack([cosine_similarity(a, b, dim=0) for a, b in combinations(flat, 2)]).mean()
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, *own in zip(parameters, *gradients, strict=True):
            g = torch.stack(own).mean(0)
            if g.dim() >= 2:
                epsilon = rho * p.norm() * muon_newton_schulz(g.flatten(1)).view_as(g)
            else:
                epsilon = rho * g / g.norm().clamp(min=1e-12)
            p.add_(epsilon)
    torch.autograd.backward(work.loss())
    with torch.no_grad():
        for p, original in zip(parameters, saved, strict=True):
            p.copy_(original)
            if p.grad is not None:
                p.grad.add_(gamma * (1 - agreement) * torch.randn_like(p))
