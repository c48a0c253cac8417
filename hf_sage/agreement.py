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

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements of one product: enough that its cost is not the call's, few enough that fp32 sums stay exact to 1e-6."""

__all__ = ["gradient_agreement", "gram_matrix", "noise_scale"]


def gram_matrix(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of the groups' gradients over all parameters.

    Args:
        gradients: For each of K groups the gradient of every parameter, in one order; ``None`` stands for zero.

    Returns:
        The ``(K, K)`` Gram matrix in fp64: products over a few parameters at a time in the gradients' precision (fp32
        at the least), summed in fp64.
    """
    k = len(gradients)
    pairs = list(combinations_with_replacement(range(k), 2))
    totals: list[Tensor] = []
    for rows in _flat_chunks(gradients):
        # Long vectors in pieces: fp32 dot products on a CPU lose 1e-3 at 10⁷ entries.
        for pieces in zip(*(torch.split(row, CHUNK) for row in rows), strict=True):
            products = torch.stack([torch.dot(pieces[i], pieces[j]) for i, j in pairs]).double()
            totals.append(products.to(totals[0].device) if totals else products)
    total = torch.stack(totals).sum(0) if totals else torch.zeros(len(pairs), dtype=torch.float64)
    gram = total.new_zeros(k, k)
    for value, (i, j) in zip(total, pairs, strict=True):
        gram[i, j] = gram[j, i] = value
    return gram


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


def _flat_chunks(gradients: Sequence[Sequence[Tensor | None]]) -> Iterator[list[Tensor]]:
    """One vector a group for runs of parameters: a few large products instead of many small ones."""
    chunk: list[list[Tensor]] = []
    size = 0
    for column in zip(*gradients, strict=True):
        like = next((t for t in column if t is not None), None)
        if like is None:
            continue
        if chunk and (size >= CHUNK or like.device != chunk[0][0].device):
            yield _flatten(chunk)
            chunk, size = [], 0
        chunk.append([torch.zeros_like(like) if t is None else t for t in column])
        size += like.numel()
    if chunk:
        yield _flatten(chunk)


def _flatten(chunk: list[list[Tensor]]) -> list[Tensor]:
    wide = [[t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in column] for column in chunk]
    return [torch.cat(row) if len(row) > 1 else row[0] for row in zip(*wide, strict=True)]
