"""What a cast leaves of ε, where the forward pass casts, passes in fp32, and which group is to blame for a NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from torch import Tensor, nn

from hf_sage.engine import Part
from hf_sage.engine.precision import (
    SAMPLE,
    full_precision,
    groups_at_fault,
    perturbation_survival,
    read_precision,
    realised_perturbation,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- What is left of ε ----


def weight_and_step(rho: float) -> tuple[Tensor, Tensor]:
    """A layer of ViT-B at its usual scale and ε = ρ‖W‖_F UVᵀ with UVᵀ uniform: RMS(ε) = ρ√768 RMS(W)."""
    weight = 0.02 * torch.randn(768, 768)
    return weight, rho * weight.norm() * torch.linalg.qr(torch.randn(768, 768)).Q


# The measured numbers of the reference (algorithms.md §B.5, #19): share that survives, where it has one, and cosine.
MEASURED = {
    "bf16 weights": (1e-6, BF16, BF16, 0.006, 0.11),
    "bf16 autocast": (1e-6, FP32, BF16, 0.02, 0.09),
    "fp16 weights": (1e-6, FP16, FP16, None, 0.31),
    "TF32": (1e-6, FP32, "tf32", None, 0.25),
    "bf16, larger ρ": (1e-3, FP32, BF16, None, 0.996),
    "TF32, larger ρ": (1e-4, FP32, "tf32", None, 0.994),
}


@pytest.mark.parametrize("case", MEASURED)
def test_measured_numbers(case):
    rho, stored, read, share, cosine = MEASURED[case]
    weight, epsilon = weight_and_step(rho)
    found = realised_perturbation([weight.to(stored)], [epsilon], [read])
    # Half a unit of the last digit that is given (0.09 may be 0.085), and as much again for another matrix.
    assert found.fidelity == pytest.approx(cosine, abs=0.001 if cosine > 0.9 else 0.01)
    assert share is None or found.survival == pytest.approx(share, rel=0.1)
    assert perturbation_survival([weight.to(stored)], [epsilon], read) == found.survival


@pytest.mark.parametrize(("rho", "lost"), [(1e-6, False), (1e-9, True)])
def test_fp32_keeps_the_default_radius_and_has_an_end_too(rho, lost):
    weight, epsilon = weight_and_step(rho)
    found = realised_perturbation([weight], [epsilon], [FP32])
    # At ρ = 1e-6, RMS(ε) = 5.5e-7 is 300 times the distance of fp32 numbers near 0.02; at 1e-9 it is a third of it.
    assert (found.survival < 0.5) == lost == (found.fidelity < 0.9)
    assert lost or found.survival > 0.995
    assert lost or found.fidelity > 0.99999


def test_the_larger_the_radius_the_more_is_left():
    weight, epsilon = weight_and_step(1e-6)
    left = [realised_perturbation([weight], [epsilon], [BF16], 10**n) for n in range(5)]
    assert sorted(left, key=lambda r: r.survival) == left == sorted(left, key=lambda r: r.fidelity)
    assert left[3] == realised_perturbation([weight], [1000 * epsilon], [BF16])


def test_tf32_has_the_mantissa_of_fp16():
    """Between ½ and 1, where fp16 has its full mantissa; but for ties, which either rounds its own way."""
    theta = (torch.rand(2**14) + 1) / 2 * torch.randn(2**14).sign()
    epsilon = 1e-4 * torch.randn(2**14)
    tf32, fp16 = (realised_perturbation([theta], [epsilon], [read]) for read in ("tf32", FP16))
    assert 0.1 < fp16.survival < 0.9
    # One number in 2^13 is a tie, and θ or θ + ε may be it.
    assert tf32.survival == pytest.approx(fp16.survival, abs=4 * 2**-13)


@pytest.mark.parametrize(("read", "bits"), [(BF16, 7), (FP16, 10), ("tf32", 10)])
def test_numbers_are_rounded_to_the_nearest(read, bits):
    """Two thirds of a unit in the last place survive, as a whole one, and one third does not."""
    theta, unit = torch.tensor([[1.0, -1.0], [4.0, -0.5]]), torch.tensor([[1.0, -1.0], [4.0, -0.5]]) * 2.0**-bits
    whole, most, none = (realised_perturbation([theta], [e], [read]) for e in (unit, 2 * unit / 3, unit / 3))
    assert (whole.survival, whole.fidelity) == (most.survival, most.fidelity) == (1.0, pytest.approx(1.0))
    assert (none.survival, none.fidelity) == (0.0, 0.0)


def test_what_is_stored_is_rounded_before_it_is_read():
    weight, epsilon = weight_and_step(1e-6)
    in_fp32, in_bf16 = (realised_perturbation([weight.bfloat16()], [epsilon], [read]) for read in (FP32, BF16))
    assert in_fp32 == in_bf16


def test_only_entries_that_are_perturbed_count():
    theta, epsilon = torch.ones(10), torch.zeros(10)
    assert realised_perturbation([theta], [epsilon], [BF16]) == realised_perturbation([], [], [])
    assert perturbation_survival([theta], [epsilon], BF16) == 1.0
    epsilon[:2], epsilon[2:4] = 1.0, 1e-6
    assert perturbation_survival([theta], [epsilon], BF16) == 0.5


def test_tensors_count_by_their_entries_and_large_ones_are_sampled():
    """A large tensor that loses ε beside a small one that keeps it."""
    large, small = torch.ones(6 * SAMPLE), torch.ones(3, SAMPLE)
    epsilon = [torch.full_like(large, 1e-6), torch.full_like(small, 1.0)]
    assert perturbation_survival([large, small], epsilon, BF16) == pytest.approx(1 / 3, abs=1e-4)
    mixed = realised_perturbation([large, small], epsilon, [FP32, BF16])
    assert (mixed.survival, mixed.fidelity) == (1.0, pytest.approx(1.0))


# ---- Where the forward pass casts ----


def switch_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if products else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if convolutions else "ieee"


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is on, which it can be where there is no CUDA, too."""
    switch_tf32(True, True)
    yield
    switch_tf32(False, True)  # as torch comes


def on_cuda(*shape: int, dtype: torch.dtype = FP32) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype, dim=lambda: len(shape))


def test_precision_of_autocast():
    for stored in (FP32, BF16, FP16):
        assert read_precision(torch.zeros(2, 2, dtype=stored)) == stored
        assert read_precision(torch.zeros(2, 2, dtype=stored), BF16) == BF16
    assert read_precision(torch.zeros(2, dtype=torch.float64), BF16) == torch.float64  # autocast passes fp64 over


@pytest.mark.usefixtures("tf32")
def test_tf32_is_read_where_products_are_taken_on_cuda():
    matrix, kernel, vector = (8, 8), (8, 3, 2, 2), (8,)
    assert [read_precision(on_cuda(*shape)) for shape in (matrix, kernel, vector)] == ["tf32", "tf32", FP32]
    assert read_precision(on_cuda(*matrix, dtype=torch.float64)) == torch.float64
    assert read_precision(on_cuda(*matrix), BF16) == BF16
    assert read_precision(torch.zeros(matrix)) == FP32  # a CPU has none
    switch_tf32(False, True)
    assert [read_precision(on_cuda(*shape)) for shape in (matrix, kernel, vector)] == [FP32, "tf32", FP32]
    switch_tf32(False, False)
    assert [read_precision(on_cuda(*shape)) for shape in (matrix, kernel, vector)] == [FP32, FP32, FP32]


# ---- Passes in fp32 ----


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("error", [None, KeyError])
def test_full_precision_switches_autocast_and_tf32_off_and_on_again(error):
    model = nn.Linear(3, 3)

    def pass_in_fp32() -> None:
        with full_precision(model, "cpu"):
            assert model(torch.ones(1, 3)).dtype == FP32
            assert read_precision(on_cuda(8, 8)) == read_precision(on_cuda(8, 8, 2, 2)) == FP32
            if error is not None:
                raise error

    with torch.autocast("cpu", dtype=BF16):
        with nullcontext() if error is None else pytest.raises(error):
            pass_in_fp32()
        assert model(torch.ones(1, 3)).dtype == BF16
    assert read_precision(on_cuda(8, 8)) == read_precision(on_cuda(8, 8, 2, 2)) == "tf32"


def test_full_precision_refuses_weights_that_have_none():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=BF16))
    with pytest.raises(ValueError, match=r"(?s)torch\.bfloat16.*dtype=torch\.float32"), full_precision(model, "cpu"):
        pass
    model[1].requires_grad_(False)  # a frozen base under an adapter is not perturbed
    with full_precision(model, "cpu"):
        pass


# ---- Which group is to blame ----


def test_groups_at_fault_are_those_with_a_loss_or_a_gradient_that_is_not_finite():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    inputs = torch.randn(6, 3)

    def part(group: str | None, value: Any) -> Part:
        return Part(group, 0.2, lambda: value(model(inputs)))

    parts = [
        part("fine", lambda y: y.sum()),
        part("no number", lambda y: y.sum() * float("nan")),
        part("infinite", lambda y: y.sum() / 0),
        part("√0", lambda y: (0 * y).sum().sqrt()),  # 0, and its derivative 0 · ∞
        part("fine", lambda y: y.square().sum()),
        part(None, lambda y: y.sum() / 0),
    ]
    model(inputs).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    assert groups_at_fault(model, parts, Tensor.backward) == ["no number", "infinite", "√0"]
    assert_same_bits([p.grad for p in model.parameters()], gradients)
    assert_same_bits(model.buffers(), buffers)
    assert_same_bits([torch.get_rng_state()], [state])
