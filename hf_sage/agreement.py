"""How far the groups' gradients agree: Gram matrix, agreement S, noise scale β (Section 3.2 of the SAGE paper).

S is the mean cosine over the K(K−1)/2 pairs of groups, so it lies in [−1/(K−1), 1] and needs the K × K Gram matrix of
the group gradients only. Two facts to keep in mind when reading it:

* on small batches S mostly measures sampling noise: for *identical* groups its expectation is about
  SNR / (1 + SNR), SNR being ‖mean gradient‖² over the variance of a group's batch gradient;
* where the weighted gradients cancel (any stationary point), S = −1 for two groups and near −1/(K−1) for K, so β is at
  its maximum γK/(K−1) at convergence, not at zero.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

__all__ = ["gradient_agreement", "gram_matrix", "noise_scale"]


def gram_matrix(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of the groups' gradients over all parameters.

    Args:
        gradients: For each of K groups the gradient of every parameter, in one order; ``None`` stands for zero.

    Returns:
        The ``(K, K)`` Gram matrix in fp64: per-parameter products in the gradients' precision (fp32 at the least),
        summed in fp64, so that 10⁸ small terms do not vanish beside large ones.
    """
    k = len(gradients)
    device = next((t.device for row in gradients for t in row if t is not None), torch.device("cpu"))
    gram = torch.zeros(k, k, dtype=torch.float64, device=device)
    for tensors in zip(*gradients, strict=True):
        for i, j in combinations_with_replacement(range(k), 2):
            a, b = tensors[i], tensors[j]
            if a is not None and b is not None:
                gram[i, j] += _inner(a, b)
    return gram + gram.triu(1).mT


def gradient_agreement(gram: Tensor) -> Tensor:
    """S: the mean pairwise cosine similarity of K gradients, from their Gram matrix.

    Args:
        gram: Gram matrix of shape ``(K, K)``, any floating dtype, at any scale.

    Returns:
        A 0-dimensional fp64 tensor in [−1, 1]. One gradient agrees with itself: S = 1 for K = 1, and for gradients that
        are all zero. A zero gradient beside others that are not has cosine 0 with them, as in the code that precedes
        the paper (GGA-L).

    Raises:
        ValueError: If ``gram`` is not a square matrix.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"The agreement needs a square (K, K) Gram matrix; got shape {tuple(gram.shape)}.")
    gram = gram.double()
    norms = gram.diagonal().clamp_min(0).sqrt()
    if gram.shape[0] == 1:
        return torch.ones((), dtype=torch.float64, device=gram.device)
    lengths = torch.where(norms > 0, norms, torch.ones_like(norms))
    cosines = (gram / lengths.unsqueeze(0) / lengths.unsqueeze(1)).clamp(-1, 1)
    rows, columns = torch.triu_indices(gram.shape[0], gram.shape[0], offset=1)
    agreement = cosines[rows, columns].mean()
    # `where` instead of `if`: no synchronisation with the device.
    return torch.where((norms == 0).all(), torch.ones_like(agreement), agreement)


def noise_scale(s: Tensor | float, gamma: float) -> Tensor:
    """β = γ(1 − S), the standard deviation of the noise that is added to the gradient.

    Args:
        s: Agreement S.
        gamma: γ ≥ 0, in units of the gradient. β reaches γK/(K−1) for K groups: γ is *not* its maximum.

    Returns:
        A 0-dimensional fp64 tensor ≥ 0.

    Raises:
        ValueError: If γ is negative or not finite.
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number, 0 or more; got {gamma!r}. 0 switches the noise off.")
    return gamma * (1 - torch.as_tensor(s, dtype=torch.float64))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)).double()
