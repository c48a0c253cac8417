"""The polar factor: the maps of singular values of each preset, and the laws that all presets keep."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from assertions import assert_close, assert_same_bits, relative_error
from problems import generator, matrix
from torch import Tensor

from hf_sage.polar import PRESETS, polar_factor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(3, 7), (7, 3), (5, 5), (1, 6), (6, 1), (1, 1)]

ROUND_OFF = 1e-4
"""Of fp32 after five quintics, whose slopes multiply to 485 (muon) and 980 (polar_express): 1e3 × eps/2, with room.

Halley's slope of 1672 is the same order.
"""

# s, cubic T=5 (six decimals)
CUBIC = [(0.5, 0.999999), (0.3, 0.995767), (0.2, 0.943030), (0.1, 0.658719), (0.05, 0.365820)]
CUBIC += [(768**-0.5, 0.268719), (0.02, 0.150962), (0.01, 0.075823)]

# s, cubic T=10, cubic T=15, muon, polar_express (three decimals, as tabulated at these s)
MAPS = [
    (1, 1, 1, 0.696, 1.029),
    (0.5, 1, 1, 0.765, 0.934),
    (0.3, 1, 1, 1.080, 0.911),
    (0.2, 1, 1, 0.747, 0.872),
    (0.1, 1, 1, 0.712, 0.875),
    (0.05, 0.9995, 1, 0.758, 0.971),
    (0.036, 0.989, 1, 1.086, 1.112),
    (0.02, 0.849, 1, 0.682, 0.944),
    (0.01, 0.529, 1, 0.699, 1.066),
    (0.003, 0.172, 0.898, 1.110, 0.965),
    (0.001, 0.058, 0.417, 0.471, 0.846),
    (1e-4, 0.006, 0.044, 0.049, 0.098),
]

RUNS = [("cubic", 5), ("cubic", 15), ("muon", 5), ("polar_express", 5), ("halley", 5)]

# Singular values i^decay, i = 1..768: cosine with UVᵀ of each of the runs
COSINES = {
    0: [1, 1, 1, 1, 1],
    -0.5: [0.830, 1, 0.989, 0.996, 1],
    -1: [0.381, 0.963, 0.964, 0.996, 1],
    -2: [0.101, 0.280, 0.286, 0.336, 0.392],
}


def image_of(s: float, preset: str, steps: int = 5) -> float:
    """What a singular value of ``s`` times the Frobenius norm is mapped to, in fp64."""
    g = torch.diag(torch.tensor([s, math.sqrt(1 - s * s)], dtype=torch.float64))
    return polar_factor(g, preset, steps)[0, 0].item()


def exact(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u @ vh


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a * b).sum() / a.norm() / b.norm()).item()


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(matrix(n, n, seed=seed)).Q


@pytest.mark.parametrize(("s", "expected"), CUBIC)
def test_cubic_map_to_six_decimals(s, expected):
    assert image_of(s, "cubic") == pytest.approx(expected, abs=5.1e-7)  # half a unit of the last decimal printed


@pytest.mark.parametrize(("s", "cubic_10", "cubic_15", "muon", "polar_express"), MAPS)
def test_maps_of_singular_values(s, cubic_10, cubic_15, muon, polar_express):
    found = [image_of(s, "cubic", 10), image_of(s, "cubic", 15), image_of(s, "muon"), image_of(s, "polar_express")]
    # Half of the third decimal; the table's last row is rounded up.
    assert found == pytest.approx([cubic_10, cubic_15, muon, polar_express], abs=5.5e-4)


@pytest.mark.parametrize(
    ("preset", "smallest", "low", "high"),
    [
        ("muon", 1e-2, 0.682, 1.134),
        ("polar_express", 1e-2, 0.870, 1.124),
        ("polar_express", 1e-3, 0.846, 1.124),
        ("halley", 1e-3, 0.963, 1.000),
    ],
)
def test_range_of_the_maps(preset, smallest, low, high):
    grid = torch.logspace(math.log10(smallest), 0, 400, dtype=torch.float64).tolist()
    images = [image_of(min(s, 1.0), preset) for s in grid]
    assert low - 1e-3 <= min(images)  # tabulated to three decimals
    assert max(images) <= high + 1e-3


@pytest.mark.parametrize(("decay", "cosines"), COSINES.items())
def test_cosine_with_the_polar_factor_for_decaying_spectra(decay, cosines):
    g = torch.diag(torch.arange(1, 769, dtype=torch.float32) ** decay)  # UVᵀ is the identity
    found = [cosine(polar_factor(g, preset, steps), torch.eye(768)) for preset, steps in RUNS]
    assert found == pytest.approx(cosines, abs=6e-4)  # half of the third decimal, and fp32


def test_cosine_with_the_polar_factor_for_gaussian_gradients():
    g = matrix(768, 768, dtype=torch.float32)
    expected = exact(g)
    found = [cosine(polar_factor(g, preset, steps), expected) for preset, steps in RUNS]
    assert found == pytest.approx([0.855, 0.992, 0.981, 0.993, 0.999], abs=2e-3)  # three decimals, of one random matrix


@pytest.mark.parametrize(("preset", "bound"), [("auto", 0.999), ("polar_express", 0.99)])  # on a CPU, and elsewhere
def test_auto_is_near_the_polar_factor_at_the_width_of_a_vit(preset, bound):
    for g in (matrix(768, 768, dtype=torch.float32), torch.diag(torch.arange(1, 769, dtype=torch.float32) ** -1)):
        assert cosine(polar_factor(g, preset), exact(g)) > bound  # "the nearest to UVᵀ": cubic and muon miss 0.99


def halley_steps(g: Tensor) -> Tensor:
    """The dynamically weighted iteration as published: its weights from the bound of each step, by linear solves."""
    x = g / torch.linalg.matrix_norm(g @ g.mT).sqrt()
    lower = 1e-3
    for _ in range(2):
        d = (4 * (1 / lower**2 - 1) / lower**2) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * math.sqrt(1 + d)))
        b = 0.25 * (a - 1) ** 2
        c = a + b - 1
        gram, eye = x @ x.mT, torch.eye(len(x), dtype=x.dtype)
        x = torch.linalg.solve(eye + c * gram, (a * eye + b * gram) @ x)
        lower *= (a + b * lower**2) / (1 + c * lower**2)
    return x


@pytest.mark.parametrize("shape", [(3, 7), (200, 200), (200, 450), (450, 400)])  # one block of rows, two and three
def test_halley_is_the_published_iteration(shape):
    g = matrix(*shape)
    assert_close([polar_factor(g, "halley")], [halley_steps(g)], 1e-9)  # fp64; the condition number is 2e4, squared


def test_halleys_map_is_the_best_of_its_degree():
    # Zolotarev: odd and of type (9, 8) it is optimal on [1e-3, 1] if it goes from one bound to the other nine times.
    images = torch.tensor([image_of(s, "halley") for s in torch.logspace(-3, 0, 2000, dtype=torch.float64).tolist()])
    low, high = images.min(), images.max()
    at_bounds = [v > 0.98 for v in images.tolist() if min(abs(v - low), abs(v - high)) < 1e-4]
    assert sum(a != b for a, b in pairwise(at_bounds)) == 9


@pytest.mark.parametrize("preset", ["halley", "svd"])
def test_presets_without_polynomials_ignore_the_steps(preset):
    g = matrix(3, 7)
    assert_same_bits([polar_factor(g, preset, 1)], [polar_factor(g, preset, 9)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_columns_of_zeros_change_nothing(preset, steps):
    # The wide matrix is iterated by its Gram matrix, the square one by itself.
    g, zeros = matrix(130, 130), torch.zeros(130, 130, dtype=torch.float64)
    wide = polar_factor(torch.cat([g, zeros], 1), preset, steps)
    assert_close([wide], [torch.cat([polar_factor(g, preset, steps), zeros], 1)], 1e-10)  # muon: 3.4¹² × eps


def test_cubic_shrinks_a_flat_spectrum_at_the_width_of_a_vit():
    factor = polar_factor(torch.eye(768), "cubic")
    assert (factor.norm() / math.sqrt(768)).item() == pytest.approx(0.2687, abs=1e-4)  # §E: .27·UVᵀ


@pytest.mark.parametrize("preset", ["cubic", "polar_express"])
def test_more_steps_converge_to_the_polar_factor(preset):
    g = matrix(6, 9)  # well conditioned; muon does not converge
    assert_close([polar_factor(g, preset, 25)], [exact(g)], 1e-10)  # quadratic: only fp64 round-off is left


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_polar_factor(shape):
    g = matrix(*shape)
    factor = polar_factor(g, "svd")
    assert_close([factor], [exact(g)], 1e-12)  # fp64, condition numbers below 1e2
    nuclear = torch.linalg.matrix_norm(g, "nuc")
    assert (g * factor).sum().item() == pytest.approx(nuclear.item(), rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("exponent", [-100, -20, -1, 1, 16, 100])
def test_powers_of_two_change_no_bit(preset, exponent):
    g = matrix(4, 6, dtype=torch.float32)
    assert_same_bits([polar_factor(g * 2.0**exponent, preset)], [polar_factor(g, preset)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("c", [1e-30, 3e-7, 7.0, 1e30])
def test_scale_of_the_gradient_does_not_matter(preset, c):
    g = matrix(4, 6, dtype=torch.float32)
    assert_close([polar_factor(c * g, preset)], [polar_factor(g, preset)], ROUND_OFF)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotations_and_transposition_commute(preset, shape):
    g, q, r = matrix(*shape), orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    factor = polar_factor(g, preset)
    assert factor.shape == g.shape
    assert factor.is_contiguous()  # adding a transposed ε to a parameter takes several times as long
    assert_close([polar_factor(q @ g @ r, preset)], [q @ factor @ r], 1e-11)  # fp64: slope 1e3 × eps, with room
    assert_close([polar_factor(g.mT, preset)], [factor.mT], 1e-11)
    assert_close([polar_factor(-g, preset)], [-factor], 1e-11)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 6, 4), (1, 5, 5)])
def test_a_stack_equals_a_loop(preset, shape):
    # Far apart: no matrix may be scaled by another.
    stack = matrix(*shape) * torch.logspace(-150, 150, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    loop = torch.stack([polar_factor(g, preset) for g in stack.flatten(0, -3)]).view(shape)
    assert_close([polar_factor(stack, preset)], [loop], 1e-11)  # batched products may sum in another order


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero_and_the_dtype_stays(preset, dtype):
    stack = torch.stack([matrix(3, 5), torch.zeros(3, 5)]).to(dtype)
    factor = polar_factor(stack, preset)
    assert factor.dtype == dtype
    assert factor[0].isfinite().all()
    assert factor[0].any()
    assert_same_bits([factor[1]], [torch.zeros(3, 5, dtype=dtype)])
    assert polar_factor(torch.zeros(2, 0, 3, dtype=dtype), preset).shape == (2, 0, 3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(preset, dtype):
    g = matrix(4, 64, dtype=dtype)
    assert_same_bits([polar_factor(g, preset)], [polar_factor(g.float(), preset).to(dtype)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_null_directions_stay_null(preset, dtype):
    rows = torch.randint(-8, 9, (2, 48), generator=generator(0)).to(dtype)  # small integers: the rank is exactly two
    g = torch.cat([rows, rows, rows[:1] - rows[1:], torch.zeros(3, 48, dtype=dtype)])
    singular_values = torch.linalg.svdvals(polar_factor(g.float(), preset))
    # fp32 round-off, 1e-7 of the norm, times the slope at zero (below 1e3), with room: bf16 products would give .5.
    assert singular_values[2] < 1e-3
    assert singular_values[1] > 0.5
    assert polar_factor(g, preset).isfinite().all()


# Singular values i^decay, i = 1..rank, of a (160, 400) matrix: some far below what fp32 resolves in a Gram matrix
SPECTRA = [(1, 0.0), (40, 0.0), (160, -1.0), (40, -2.0), (160, -4.0)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("rank", "decay"), SPECTRA)
def test_round_off_is_not_amplified(preset, rank, decay):
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** decay
    g = (orthogonal(160, 1)[:, :rank] * values) @ orthogonal(400, 2)[:rank]
    found = polar_factor(g.float(), preset)
    singular_values = torch.linalg.svdvals(found.double())
    assert singular_values[0] < 1.21  # Muon's maximum; the others stay below 1.13
    null = singular_values[rank:] if preset != "svd" else []  # fp32 g has full rank, by its own round-off
    assert all(s < 1e-3 for s in null)
    resolved = values > 1e-2  # the share of each true singular direction, not only some singular values
    share = ((orthogonal(160, 1).mT @ found.double()) * orthogonal(400, 2)[:160]).sum(1)[:rank][resolved]
    assert_close([share], [torch.diagonal(polar_factor(torch.diag(values), preset))[resolved]], 1e-3)


@pytest.mark.parametrize("preset", ["polar_express", "cubic"])
def test_many_steps_do_not_diverge_on_null_directions(preset):
    rows = torch.randint(-8, 9, (2, 260), generator=generator(0)).float()
    factor = polar_factor(rows.repeat(70, 1), preset, 60)
    assert torch.linalg.svdvals(factor)[0] < 1.01  # the Gram matrix' null eigenvalues, slightly negative, would run off


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "svd"])  # which raises
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_finite_stays_so_and_harms_no_other_matrix(preset, bad, shape):
    stack = matrix(2, *shape, dtype=torch.float32)
    stack[1, -1, -1] = bad
    good, spoilt = polar_factor(stack, preset)
    assert spoilt.isnan().all()
    assert_close([good], [polar_factor(stack[0], preset)], ROUND_OFF)


def test_muon_agrees_with_the_quintic_of_torch():
    oracle = getattr(pytest.importorskip("torch.optim._muon"), "_zeropower_via_newtonschulz", None)
    if oracle is None:
        pytest.skip("this torch has no such private function")
    g = matrix(16, 32, dtype=torch.float32)
    theirs = oracle(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert relative_error(polar_factor(g, "muon"), theirs) < 2e-2  # bf16 there: 2⁻⁸ a product, a few of them


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_must_be_a_positive_whole_number(steps):
    with pytest.raises(ValueError, match="1 or more"):
        polar_factor(matrix(2, 2), "muon", steps)


def test_errors_hand_over_the_cure():
    with pytest.raises(ValueError, match="newton") as raised:
        polar_factor(matrix(2, 2), "newton")
    assert all(repr(preset) in str(raised.value) for preset in PRESETS)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        polar_factor(matrix(3))
