"""Agreement S and noise scale β: the closed forms of Appendix C, bounds, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from problems import matrix
from torch import Tensor

from hf_sage.agreement import gradient_agreement, gram_matrix, noise_scale

ROUND_OFF = 1e-12
"""Cosines of a few hundred fp64 terms."""


def agreement(*gradients: Tensor) -> float:
    return gradient_agreement(gram_matrix([[g] for g in gradients])).item()


def appendix_c(theta: tuple[float, float]) -> list[Tensor]:
    """The two domains' gradients H_k θ − b_k of the paper's example."""
    point = torch.tensor(theta, dtype=torch.float64)
    hessians = [torch.tensor([[10, h], [h, 4.01]], dtype=torch.float64) for h in (2.0, -2.0)]
    return [h @ point - torch.tensor([1, b], dtype=torch.float64) for h, b in zip(hessians, (2.0, -2.0), strict=True)]


def test_appendix_c_at_the_origin_and_at_the_minimum():
    g1, g2 = appendix_c((0, 0))
    assert (g1.tolist(), g2.tolist()) == ([-1, -2], [-1, 2])  # as printed in the paper
    assert agreement(g1, g2) == pytest.approx(-0.6, abs=ROUND_OFF)
    assert agreement(*appendix_c((0.1, 0))) == pytest.approx(-1, abs=ROUND_OFF)


@pytest.mark.parametrize(
    ("t", "expected"), [(0, -0.6), (0.05, -0.870), (0.1, -1), (0.2, -0.438), (0.5, 0.882), (1, 1), (2, 0.978)]
)
def test_appendix_c_along_the_invariant_feature(t, expected):
    assert agreement(*appendix_c((t, 0))) == pytest.approx(expected, abs=5.1e-4)  # three decimals tabulated


@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("dimensions", [1, 2, 20])
def test_agreement_is_between_its_bounds(k, dimensions):
    for seed in range(20):
        s = agreement(*matrix(k, dimensions, seed=seed))
        assert -1 / (k - 1) - ROUND_OFF <= s <= 1


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_bounds_are_reached(k):
    simplex = torch.eye(k, dtype=torch.float64) - 1 / k  # k directions as far apart as k directions can be
    assert agreement(*simplex) == pytest.approx(-1 / (k - 1), abs=ROUND_OFF)
    assert agreement(*[simplex[0] * c for c in range(1, k + 1)]) == pytest.approx(1, abs=ROUND_OFF)
    assert agreement(*torch.eye(k)) == 0


def test_agreement_is_the_mean_over_pairs():
    a, b, c = matrix(3, 4)
    pairs = [torch.cosine_similarity(u, v, dim=0).item() for u, v in ((a, b), (a, c), (b, c))]
    assert agreement(a, b, c) == pytest.approx(sum(pairs) / 3, abs=ROUND_OFF)


def test_order_and_coordinates_do_not_matter():
    g = matrix(4, 7)
    rotation = torch.linalg.qr(matrix(7, 7, seed=1)).Q
    for other in (g[[2, 0, 3, 1]], g.flip(0), g @ rotation, g[:, torch.randperm(7)]):
        assert agreement(*other) == pytest.approx(agreement(*g), abs=ROUND_OFF)


@pytest.mark.parametrize("c", [1e-10, 3.0, 2.0**16, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_do_not_matter(c, dtype):
    g = matrix(3, 50, dtype=dtype)
    # Rescaling rounds the gradients in fp32, and the products are taken in it: a few of its 1e-7.
    tolerance = 1e-6 if dtype == torch.float32 else ROUND_OFF
    assert agreement(g[0], c * g[1], g[2] / 7) == pytest.approx(agreement(*g), abs=tolerance)
    assert gradient_agreement(c * gram_matrix([[x] for x in g])).item() == pytest.approx(agreement(*g), abs=tolerance)


def test_one_gradient_agrees_with_itself():
    assert agreement(matrix(5)) == 1
    assert agreement(torch.zeros(5)) == 1


@pytest.mark.parametrize("k", [2, 4])
def test_gradients_that_are_all_zero_agree(k):
    assert agreement(*torch.zeros(k, 5)) == 1


def test_a_zero_gradient_has_cosine_zero_with_the_others():
    g = matrix(6)
    assert agreement(g, torch.zeros(6, dtype=g.dtype)) == 0
    # Of the three pairs one is aligned.
    assert agreement(g, 2 * g, torch.zeros(6, dtype=g.dtype)) == pytest.approx(1 / 3, abs=ROUND_OFF)


def test_gram_matrix_is_that_of_the_flattened_gradients():
    rows = [[matrix(3, 4, seed=k), matrix(5, seed=10 + k), matrix(1, seed=20 + k).squeeze()] for k in range(3)]
    flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    gram = gram_matrix(rows)
    assert gram.dtype == torch.float64
    assert torch.allclose(gram, flat @ flat.mT, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_layout_in_memory_does_not_matter():
    a, b = matrix(2, 3, 4, 5, seed=0), matrix(2, 3, 4, 5, seed=1)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (a, b)]
    assert agreement(last[0], b) == pytest.approx(agreement(a, b), abs=ROUND_OFF)


def test_none_stands_for_zero():
    a, b, c = matrix(3, 4)
    zero = torch.zeros(4, dtype=torch.float64)
    gram = gram_matrix([[a, None, None], [b, c, None]])
    assert torch.equal(gram, gram_matrix([[a, zero, zero], [b, c, zero]]))
    assert torch.equal(gram_matrix([[None], [None]]), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_neither_overflow_nor_lose_digits(dtype):
    g = matrix(2, 1000).mul(100).to(dtype)  # squares sum to 1e7, fp16 ends at 65504
    assert agreement(*g) == pytest.approx(agreement(*g.double()), abs=1e-6)  # fp32 products


@pytest.mark.parametrize("shapes", [[2**22], [2**14] * 64], ids=["an embedding", "many layers"])
def test_large_gradients_lose_no_digits(shapes):
    """Law 6's 1e-5, which naive fp32 sums miss from some 10⁶ elements on: they are biased by what they round away."""
    rows = [[matrix(n, seed=i, dtype=torch.float32) for i, n in enumerate(shapes)]] * 2
    expected = sum(g.double().square().sum().item() for g in rows[0])
    assert gram_matrix(rows)[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_groups_must_have_the_same_parameters():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        gram_matrix([[matrix(2)], [matrix(2), matrix(3)]])


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0), (1, 2, 2)])
def test_a_gram_matrix_is_square(shape):
    with pytest.raises(ValueError, match="square"):
        gradient_agreement(torch.zeros(shape))


@pytest.mark.parametrize(("s", "beta"), [(1, 0), (0, 2), (-0.6, 3.2), (-1, 4), (torch.tensor(0.5), 1)])
def test_noise_scale(s, beta):
    assert noise_scale(s, 2.0).item() == pytest.approx(beta, abs=ROUND_OFF)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_range_of_the_noise_scale(k):
    gamma, simplex = 0.3, torch.eye(k, dtype=torch.float64) - 1 / k
    gram = gram_matrix([[g] for g in simplex])
    assert noise_scale(gradient_agreement(gram), gamma).item() == pytest.approx(gamma * k / (k - 1), rel=ROUND_OFF)
    for seed in range(20):
        # One value of β below zero, by a cosine rounded above one, would be a negative standard deviation.
        aligned = matrix(1, 7, seed=seed) * torch.arange(1, k + 1, dtype=torch.float64).view(-1, 1)
        assert noise_scale(agreement(*aligned), gamma) >= 0


@pytest.mark.parametrize("gamma", [-1e-9, math.nan, math.inf, -math.inf])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        noise_scale(0.0, gamma)
