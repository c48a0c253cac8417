"""Ascents: the length and the direction of ε, and what each of them is invariant to."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from assertions import assert_close, assert_same_bits, assert_spread, relative_error
from problems import concentric_circles, generator, matrix
from torch import Tensor

from hf_sage.ascents import Ascent, L2Ascent, SpectralAscent, spectral
from hf_sage.polar import PRESETS

RHO = 0.05
EXACT = SpectralAscent(RHO, polar="svd")
ALL = [
    pytest.param(L2Ascent(RHO), id="l2"),
    *[pytest.param(SpectralAscent(RHO, polar=preset), id=preset) for preset in PRESETS],
]
ROUND_OFF = 1e-12
"""fp64, tensors of a few dozen entries."""


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A kernel, a wide and a tall matrix, a vector and a scalar."""
    shapes = [(4, 3, 2, 2), (3, 7), (6, 2), (5,), ()]
    return [matrix(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


# ---- Length and direction ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sam_goes_rho_along_the_whole_gradient(dtype):
    theta, g = tensors(0, dtype), tensors(10, dtype)
    epsilon = L2Ascent(RHO)(theta, g)
    assert norm(epsilon) == pytest.approx(RHO, rel=1e-6)  # fp32
    assert_close(epsilon, [RHO * x / norm(g) for x in g], 1e-6)


def test_sam_goes_rho_in_a_large_network():
    # Law 6's 1e-5: a norm that is summed naively in fp32 is 1e-4 too small at this size.
    (epsilon,) = L2Ascent(RHO)([torch.ones(2**22)], [matrix(2**22, dtype=torch.float32)])
    assert norm([epsilon]) == pytest.approx(RHO, rel=1e-5)


def test_spectral_radius_of_matrices_and_vectors():
    theta, g = tensors(0), tensors(10)
    kernel, wide, tall, bias, scalar = EXACT(theta, g)
    for epsilon, p, rank in ((kernel, theta[0], 4), (wide, theta[1], 3), (tall, theta[2], 2)):
        size = RHO * p.norm().item()
        assert epsilon.norm().item() == pytest.approx(size * math.sqrt(rank), rel=ROUND_OFF)
        singular_values = torch.linalg.svdvals(epsilon.flatten(1))
        assert torch.allclose(singular_values, torch.full_like(singular_values, size), rtol=ROUND_OFF)
    assert_close([bias], [RHO * g[3] / g[3].norm()], ROUND_OFF)
    assert_close([scalar], [RHO * g[4].sign()], ROUND_OFF)


def test_norm_radius_of_vectors():
    theta, g = tensors(0), tensors(10)
    published, relative = EXACT(theta, g), SpectralAscent(RHO, polar="svd", bias_radius="norm")(theta, g)
    assert_same_bits(relative[:3], published[:3])
    assert_close(relative[3:], [p.norm() * e for p, e in zip(theta[3:], published[3:], strict=True)], ROUND_OFF)


def test_without_weight_scale_the_radius_is_absolute():
    theta, g = tensors(0), tensors(10)
    scaled, plain = EXACT(theta, g), SpectralAscent(RHO, polar="svd", weight_scale=False)(theta, g)
    assert_close([p.norm() * e for p, e in zip(theta[:3], plain[:3], strict=True)], scaled[:3], ROUND_OFF)
    assert_same_bits(plain[3:], scaled[3:])


@pytest.mark.parametrize("preset", PRESETS)
def test_kernels_are_matrices_of_output_channel_by_the_rest(preset):
    ascent, w, g = SpectralAscent(RHO, polar=preset), matrix(6, 3, 2, 2, seed=1), matrix(6, 3, 2, 2, seed=2)
    (kernel,), (flat,) = ascent([w], [g]), ascent([w.view(6, 12)], [g.view(6, 12)])
    assert_same_bits([kernel.reshape(6, 12)], [flat])
    last = [x.contiguous(memory_format=torch.channels_last) for x in (w, g)]
    assert_close(ascent([last[0]], [last[1]]), [kernel], 1e-11)  # sums in another order, times the presets' slopes


def layers() -> tuple[list[Tensor], list[Tensor]]:
    """Several tensors of one shape, between others, of three dtypes; gradients of different sizes."""
    shapes = [(3, 8), (8, 3), (3, 8), (5,), (3, 2, 2, 2), (3, 8), (8, 3), (8,), (3, 8), (3, 8), (0, 4)]
    dtypes = [torch.float64] * 5 + [torch.float32, torch.float64, torch.float64, torch.bfloat16] + [torch.float64] * 2
    theta, g = (
        [
            matrix(*shape, seed=seed + i, dtype=dtype)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        for seed in (0, 50)
    )
    return theta, [x * 2.0 ** (i - 5) for i, x in enumerate(g)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("entries", [1, 50, 2**18])  # no two, two, and all matrices of a shape together
def test_layers_of_one_shape_do_not_meet(monkeypatch, preset, entries):
    monkeypatch.setattr(spectral, "STACK_ON_CPU", entries)
    ascent, (theta, g) = SpectralAscent(RHO, polar=preset), layers()
    together = ascent(theta, g)
    alone = [ascent([p], [x])[0] for p, x in zip(theta, g, strict=True)]
    assert [e.shape for e in together] == [p.shape for p in theta]
    assert [e.dtype for e in together] == [e.dtype for e in alone]
    assert_close(together[:5], alone[:5], 1e-11)  # fp64: a stack may sum in another order, times the presets' slopes
    assert_close(together[5:], alone[5:], 1e-4)  # fp32 among them


@pytest.mark.parametrize("entries", [1, 50, 72, 2**18])
def test_stacks_stay_within_their_bound(monkeypatch, entries):
    stacks: list[tuple[int, ...]] = []

    def watched(matrices: Tensor, *_: object) -> Tensor:
        stacks.append(tuple(matrices.shape))
        return torch.zeros_like(matrices)

    monkeypatch.setattr(spectral, "STACK_ON_CPU", entries)
    monkeypatch.setattr(spectral, "polar_factor", watched)
    SpectralAscent(RHO)(*layers())
    assert all(depth == 1 or depth * m * n <= entries for depth, m, n in stacks)
    most = max(1, min(entries // 24, 4))  # fp64 (3, 8): three matrices and a kernel
    assert max(depth for depth, m, n in stacks if (m, n) == (3, 8)) == most


@pytest.mark.parametrize("ascent", ALL)
def test_epsilon_ascends(ascent):
    theta, g = tensors(0), tensors(10)
    products = [(e * x).sum().item() for e, x in zip(ascent(theta, g), g, strict=True)]
    assert min(products) > 0


def test_first_order_rise_is_the_nuclear_norm():
    theta, g = tensors(0), tensors(10)
    rise = sum((e * x).sum().item() for e, x in zip(EXACT(theta, g), g, strict=True))
    matrices = sum(
        p.norm() * torch.linalg.matrix_norm(x.flatten(1), "nuc") for p, x in zip(theta[:3], g[:3], strict=True)
    )
    assert rise == pytest.approx(RHO * (matrices + g[3].norm() + g[4].abs()).item(), rel=ROUND_OFF)


# ---- What does not matter ----


@pytest.mark.parametrize("ascent", ALL)
@pytest.mark.parametrize("exponent", [-40, -1, 16, 40])
def test_loss_scale_changes_no_bit(ascent, exponent):
    theta, g = tensors(0, torch.float32), tensors(10, torch.float32)
    assert_same_bits(ascent(theta, [x * 2.0**exponent for x in g]), ascent(theta, g))


@pytest.mark.parametrize("ascent", ALL)
def test_inputs_are_left_alone(ascent):
    theta, g = tensors(0), tensors(10)
    epsilon = ascent(theta, g)
    assert_same_bits(theta + g, tensors(0) + tensors(10))
    memory = {x.untyped_storage().data_ptr() for x in theta + g}
    assert not memory & {e.untyped_storage().data_ptr() for e in epsilon}  # `perturbed` uses ε's memory up


@pytest.mark.parametrize("ascent", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_epsilon_of_half_precision_parameters_is_fp32(ascent, dtype):
    theta, g = tensors(0, dtype), tensors(10, dtype)
    epsilon = ascent(theta, g)
    assert {e.dtype for e in epsilon} == {torch.float32}
    # The same numbers in fp32: what is left is the round-off that the quintics' slopes enlarge.
    assert_close(epsilon, ascent([p.float() for p in theta], [x.float() for x in g]), 1e-4)


# ---- Degenerate gradients and parameters ----


@pytest.mark.parametrize("ascent", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_give_no_perturbation(ascent, dtype):
    epsilon = ascent(tensors(0, dtype), [torch.zeros_like(x) for x in tensors(0, dtype)])
    assert not any(e.any() for e in epsilon)  # NaN would be true


@pytest.mark.parametrize("ascent", ALL)
@pytest.mark.parametrize("size", [1e-40, 1e-20])
def test_vanishing_gradients_stay_finite(ascent, size):
    theta = [torch.ones(()), torch.ones(2, 2)]
    epsilon = ascent(theta, [torch.tensor(size), torch.zeros(2, 2)])
    assert all(e.isfinite().all() for e in epsilon), epsilon


@pytest.mark.parametrize("ascent", [EXACT, SpectralAscent(RHO)])
def test_a_zero_matrix_stays_where_it_is(ascent):
    zero, g = torch.zeros(3, 4, dtype=torch.float64), matrix(3, 4)
    assert not ascent([zero], [g])[0].any()
    free = SpectralAscent(RHO, polar="svd", weight_scale=False)([zero], [g])[0]
    assert free.norm().item() == pytest.approx(RHO * math.sqrt(3), rel=ROUND_OFF)


@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_round_off_gets_no_perturbation(index):
    theta, g = tensors(0), tensors(10)
    others = norm([x for i, x in enumerate(g) if i != index])
    of_share = [[x * share * others / x.norm() if i == index else x for i, x in enumerate(g)] for share in (1e-7, 1e-5)]
    below, above, whole = EXACT(theta, of_share[0]), EXACT(theta, of_share[1]), EXACT(theta, g)
    assert not below[index].any()  # 1e-6 of the whole gradient is the threshold
    assert_close(above, whole, ROUND_OFF)
    assert_close(
        [e for i, e in enumerate(below) if i != index], [e for i, e in enumerate(whole) if i != index], ROUND_OFF
    )


@pytest.mark.parametrize("rho", [-1e-9, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ascent", [L2Ascent, SpectralAscent])
def test_bad_rho_is_refused(ascent, rho):
    with pytest.raises(ValueError, match="rho"):
        ascent(rho)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [({"polar": "newton"}, "polar_express"), ({"polar_steps": 0}, "polar_steps"), ({"bias_radius": "none"}, "fixed")],
)
def test_bad_options_are_refused(wrong, names):
    with pytest.raises(ValueError, match=names):
        SpectralAscent(RHO, **wrong)


# ---- Invariance to rescaling (Appendix D.1, Figure 4) ----

ALPHAS = torch.logspace(-1, 1, 7, dtype=torch.float64)
Problem = tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]


@pytest.fixture(scope="module")
def circles() -> Problem:
    return concentric_circles()


def by_layer(theta: list[Tensor], alpha: Tensor) -> list[Tensor]:
    w1, b1, w2, b2 = theta
    return [alpha * w1, alpha * b1, w2 / alpha, b2]


def by_neuron(theta: list[Tensor], alpha: Tensor) -> list[Tensor]:
    w1, b1, w2, b2 = theta
    scale = alpha ** torch.linspace(-1, 1, 64, dtype=torch.float64)[torch.randperm(64, generator=generator(0))]
    return [scale[:, None] * w1, scale * b1, w2 / scale, b2]


def sharpnesses(circles: Problem, ascent: Ascent, rescaled: Callable) -> list[float]:
    """L(θ + ε) − L(θ) at rescaled parameters of one and the same function."""
    loss, minimum = circles
    found = []
    for alpha in ALPHAS:
        theta = [p.requires_grad_() for p in rescaled(minimum, alpha)]
        clean = loss(theta)
        assert relative_error(clean, loss(minimum)) < 1e-9  # the same function, but for round-off
        epsilon = ascent([p.detach() for p in theta], list(torch.autograd.grad(clean, theta)))
        found.append((loss([p + e for p, e in zip(theta, epsilon, strict=True)]) - clean).item())
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_sage_with_relative_bias_radius_is_invariant(circles, preset):
    found = sharpnesses(circles, SpectralAscent(RHO, polar=preset, bias_radius="norm"), by_layer)
    assert_spread(found, at_most=1 + 1e-6)  # exact but for fp64 round-off, which a sharpness near zero enlarges


def test_sage_as_published_is_not_invariant_because_of_its_biases(circles):
    assert_spread(sharpnesses(circles, EXACT, by_layer), more_than=1.5)


def test_sam_is_not_invariant(circles):
    assert_spread(sharpnesses(circles, L2Ascent(RHO), by_layer), more_than=5)


@pytest.mark.parametrize("bias_radius", ["fixed", "norm"])
def test_sage_is_not_invariant_to_rescaling_single_neurons(circles, bias_radius):
    found = sharpnesses(circles, SpectralAscent(RHO, polar="svd", bias_radius=bias_radius), by_neuron)
    assert_spread(found, more_than=1.5)
