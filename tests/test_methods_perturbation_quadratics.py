"""The perturbation family where the Hessian is known, and what its rules are invariant to."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close, assert_spread, relative_error
from problems import concentric_circles, generator, matrix
from torch import Tensor, nn

from hf_sage.ascents import AdaptiveAscent, L2Ascent, VarianceSuppressedAscent
from hf_sage.corrections import Descent, EigenvectorCorrection
from hf_sage.curvature import power_iteration
from hf_sage.engine import Part, Step, two_pass_step
from hf_sage.methods import Method, eigen_sam, gam, gsam, look_sam, sagm, sam, x_sam
from hf_sage.rules import Step as RuleStep
from hf_sage.vectors import along, cosine, inner, norm, projection, unit

RHO = 0.3
EIGENVALUES = torch.tensor([4.0, 2.5, 1.0, 0.5, -0.3], dtype=torch.float64)
NEGATIVE_END = torch.tensor([2.0, 1.0, 0.5, -1.0, -6.0], dtype=torch.float64)
"""The eigenvalue of largest magnitude is negative."""

ROUND_OFF = 1e-12


def with_eigenvalues(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix and its eigenvectors, as columns, in the order of the eigenvalues."""
    rotation = torch.linalg.qr(matrix(len(eigenvalues), len(eigenvalues)))[0]
    return rotation @ torch.diag(eigenvalues) @ rotation.mT, rotation


class Quadratic(nn.Module):
    """½ θᵀHθ."""

    def __init__(self, hessian: Tensor) -> None:
        super().__init__()
        self.hessian = hessian
        self.theta = nn.Parameter(matrix(len(hessian), seed=7))

    def forward(self) -> Tensor:
        return self.theta @ self.hessian @ self.theta / 2


def gradient(method: Method, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """θ, and the gradient that the method descends there."""
    model = Quadratic(hessian)
    two_pass_step(model, [Part("all", 1.0, model)], method, step=Step(seed=3))
    return model.theta.detach(), model.theta.grad


def hat(v: Tensor) -> Tensor:
    return v / v.norm()


# ---- Closed forms ----


def test_sam_moves_the_gradient_by_rho_h_g():
    h, _ = with_eigenvalues(EIGENVALUES)
    theta, found = gradient(sam(RHO), h)
    assert_close([found], [h @ theta + RHO * h @ hat(h @ theta)], ROUND_OFF)


def test_sagm_moves_it_by_half_of_that_less_alpha_h_g():
    h, _ = with_eigenvalues(EIGENVALUES)
    theta, found = gradient(sagm(RHO, 0.1), h)
    g = h @ theta
    assert_close([found], [g + (RHO * h @ hat(g) - 0.1 * h @ g) / 2], ROUND_OFF)


def test_gsam_takes_off_what_raises_the_gap_alone():
    h, _ = with_eigenvalues(EIGENVALUES)
    theta, found = gradient(gsam(RHO, 0.4), h)
    g, (_, g_p) = h @ theta, gradient(sam(RHO), h)
    assert (found - g_p) @ g_p == pytest.approx(0, abs=ROUND_OFF)  # nothing of it is along the perturbed gradient
    assert_close([found], [g_p - 0.4 * (g - (g @ g_p) / (g_p @ g_p) * g_p)], ROUND_OFF)


def test_gams_difference_is_the_hessian_times_the_gradients_direction():
    """On a quadratic the finite differences are exact: d = ρHĝ₀, g₃ − g₂ = ρHĝ₂."""
    h, _ = with_eigenvalues(EIGENVALUES)
    theta, found = gradient(gam(RHO, 0.2, alpha=0.0), h)
    g0 = h @ theta
    g2 = g0 + h @ (0.2 * hat(h @ hat(g0)))
    assert_close([found], [(g0 + RHO * h @ hat(g0)) + (g2 + RHO * h @ hat(g2))], 1e-11)


def test_look_sam_reuses_what_was_orthogonal_to_the_gradient():
    h, _ = with_eigenvalues(EIGENVALUES)
    model, memories = Quadratic(h), {}
    parts = [Part("all", 1.0, model)]
    two_pass_step(model, parts, look_sam(RHO, 0.7, 2), step=Step(number=0), memories=memories)
    g = h @ model.theta.detach()
    (direction,) = memories["correction 0"]["direction"]
    assert direction @ g == pytest.approx(0, abs=ROUND_OFF)
    assert_close([direction], [hat(h @ hat(g) - (hat(g) @ h @ hat(g)) * hat(g))], 1e-11)
    model.theta.grad = None
    two_pass_step(model, parts, look_sam(RHO, 0.7, 2), step=Step(number=1), memories=memories)
    assert_close([model.theta.grad], [g + 0.7 * g.norm() * direction], ROUND_OFF)


def test_vasso_averages():
    ascent, step = VarianceSuppressedAscent(RHO, theta=0.25), RuleStep()
    theta, first, second = [matrix(6)], matrix(6, seed=1), matrix(6, seed=2)
    assert_close(ascent(theta, [first], step), [RHO * hat(first)], ROUND_OFF)
    assert_close(ascent(theta, [second], step), [RHO * hat(0.75 * first + 0.25 * second)], ROUND_OFF)


# ---- Curvature ----


@pytest.mark.parametrize("eigenvalues", [EIGENVALUES, NEGATIVE_END, EIGENVALUES - 5], ids=["max", "min", "negative"])
def test_power_iteration_finds_the_largest_eigenvalue_not_that_of_largest_magnitude(eigenvalues):
    h, vectors = with_eigenvalues(eigenvalues)
    found = power_iteration(lambda x: [h @ x[0]], [matrix(5, seed=1)], 400)
    assert abs(hat(found.vector[0]) @ vectors[:, 0]).item() == pytest.approx(1, abs=1e-10)
    assert found.value == pytest.approx(eigenvalues[0].item(), abs=1e-8)
    assert found.shift <= eigenvalues.abs().max() * (1 + ROUND_OFF)


def test_power_iteration_stands_still_where_there_is_no_curvature():
    start = [matrix(5)]
    assert_close(power_iteration(lambda x: [0 * x[0]], start, 3).vector, unit(start), ROUND_OFF)
    assert_close(power_iteration(lambda x: [x[0] * torch.inf], start, 3).vector, unit(start), ROUND_OFF)


def test_refreshes_of_one_product_each_are_one_power_iteration():
    """The vector and the shift are both remembered: a shift that was lost lets the negative end back in."""
    h, vectors = with_eigenvalues(NEGATIVE_END)
    model, memories = Quadratic(h), {}
    for number in range(400):
        two_pass_step(model, [Part("all", 1.0, model)], x_sam(RHO, 1.0, 1, 1), step=Step(number), memories=memories)
    (found,) = memories["correction 0"]["eigenvector"]
    assert abs(found @ vectors[:, 0]).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("alpha", "left"), [(0.0, 1.0), (1.0, 0.0), (2.0, -1.0), (0.25, 0.75)])
@pytest.mark.parametrize("eigenvalues", [EIGENVALUES, NEGATIVE_END])
def test_x_sam_leaves_a_share_of_the_part_along_the_eigenvector(alpha, left, eigenvalues):
    h, vectors = with_eigenvalues(eigenvalues)
    (_, found), (_, g_p) = gradient(x_sam(RHO, alpha, 1, 400), h), gradient(sam(RHO), h)
    expected = vectors.mT @ g_p * torch.tensor([left, 1, 1, 1, 1], dtype=torch.float64)
    assert_close([vectors.mT @ found], [expected], 1e-8)  # 400 iterations


def test_eigen_sam_turns_towards_the_eigenvector():
    h, vectors = with_eigenvalues(EIGENVALUES)
    theta, found = gradient(eigen_sam(RHO, 0.5, 1, 400), h)
    g, v = hat(h @ theta), vectors[:, 0]
    turned = g + 0.5 * (g @ v).sign() * (v - (g @ v) * g)
    assert_close([found], [h @ (theta + RHO * turned)], 1e-8)
    assert abs(turned @ v) / turned.norm() > abs(g @ v)


@pytest.mark.parametrize(("variant", "is_invariant"), [("invariant", True), ("literal", False)])
def test_the_sign_of_the_eigenvector(variant, is_invariant):
    """The literal formula subtracts |⟨g, v⟩|v: v and −v give different updates."""
    found = []
    for sign in (1.0, -1.0):
        g = matrix(6)
        memory = {"eigenvector": [sign * hat(matrix(6, seed=1))], "refreshed": 0, "shift": 0.0}
        descent = Descent(torch.tensor(1.0), RuleStep(number=1, memory=memory), perturbed=True)
        EigenvectorCorrection(0.5, interval=3, variant=variant)([g], descent)
        found.append(g)
    assert (relative_error(*found) < ROUND_OFF) == is_invariant


# ---- Vectors ----


def test_lists_of_tensors_are_one_vector():
    a, b = [matrix(3, 4), matrix(5, seed=1)], [matrix(3, 4, seed=2), matrix(5, seed=3)]
    x, y = (torch.cat([t.reshape(-1) for t in v]) for v in (a, b))
    expected = [x.norm(), x @ y, x @ y / x.norm() / y.norm(), (x @ y) / (y @ y)]
    assert_close([norm(a), inner(a, b), cosine(a, b), projection(a, b)], expected, ROUND_OFF)
    zero = [torch.zeros_like(t) for t in a]
    found = torch.stack([cosine(a, zero), projection(a, zero), norm(unit(zero)), norm(along(zero, 2.0, a))])
    assert not found.any()


# ---- Invariance to rescaling (the claim of ASAM) ----


@pytest.fixture(scope="module")
def circles() -> tuple:
    return concentric_circles()


def by_layer(theta: list[Tensor], alpha: float) -> list[Tensor]:
    w1, b1, w2, b2 = theta
    return [alpha * w1, alpha * b1, w2 / alpha, b2]


def by_neuron(theta: list[Tensor], alpha: float) -> list[Tensor]:
    w1, b1, w2, b2 = theta
    scale = alpha ** torch.linspace(-1, 1, 64, dtype=torch.float64)[torch.randperm(64, generator=generator(0))]
    return [scale[:, None] * w1, scale * b1, w2 / scale, b2]


def sharpnesses(circles, ascent, rescaled) -> list[float]:
    """L(θ + ε) − L(θ) at rescaled parameters of one and the same function."""
    loss, minimum = circles
    found = []
    for alpha in (0.1, 0.5, 1.0, 3.0, 10.0):
        theta = [p.requires_grad_() for p in rescaled(minimum, alpha)]
        clean = loss(theta)
        epsilon = ascent([p.detach() for p in theta], list(torch.autograd.grad(clean, theta)))
        found.append((loss([p + e for p, e in zip(theta, epsilon, strict=True)]) - clean).item())
    return found


@pytest.mark.parametrize("rescaled", [by_layer, by_neuron])
def test_asam_is_invariant_without_eta_and_nearly_so_with_it(circles, rescaled):
    assert_spread(sharpnesses(circles, AdaptiveAscent(0.5, eta=0.0), rescaled), at_most=1 + 1e-6)
    assert_spread(sharpnesses(circles, AdaptiveAscent(0.5, eta=0.01), rescaled), at_most=1.1)


@pytest.mark.parametrize(
    ("ascent", "at_least"), [(AdaptiveAscent(0.5, 0.01, scaled="matrices"), 10), (L2Ascent(0.05), 5)]
)
def test_asam_with_unscaled_biases_is_not_nor_is_sam(circles, ascent, at_least):
    assert_spread(sharpnesses(circles, ascent, by_layer), more_than=at_least)
