"""Assertions that several tests share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaNs, infinities and signed zeros compare as they are stored."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensor") -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, b), f"{what} {i} changed: largest difference {(a - b).abs().max() if a.numel() else 0}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖a − b‖/‖b‖ in fp64, and ‖a‖ where b is zero."""
    a, b = actual.detach().double(), expected.detach().double()
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    size = torch.linalg.vector_norm(b).item()
    return torch.linalg.vector_norm(a - b).item() / (size or 1.0)


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float, what: str = "tensor") -> None:
    """Each tensor agrees in the relative norm; NaN never does."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_error(a, b)
        assert error <= tolerance, f"{what} {i} is off by {error:.3g} (relative), allowed {tolerance:.3g}"


def assert_spread(values: Iterable[float], *, at_most: float | None = None, more_than: float | None = None) -> None:
    """Bounds max/min of positive numbers."""
    values = list(values)
    assert min(values) > 0, f"expected positive numbers, got {values}"
    ratio = max(values) / min(values)
    assert at_most is None or ratio <= at_most, f"max/min is {ratio:.6g}, allowed {at_most}: {values}"
    assert more_than is None or ratio > more_than, f"max/min is {ratio:.6g}, expected more than {more_than}: {values}"
