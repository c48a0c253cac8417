"""Random numbers: the noise of SAGE and its distribution; noise and dropout masks that can be drawn again."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from assertions import assert_same_bits
from problems import batch, matrix, network_with, parts_of
from torch import Tensor, nn

from hf_sage.corrections import AgreementNoise, Descent
from hf_sage.engine import RandomState, Step, step_seed, two_pass_step
from hf_sage.methods import erm, sam

GAMMA = 0.1
N = 200_000
SIGMAS = 5
"""Sampling errors allowed: with fixed seeds these tests pass or fail once and for all, one in 10⁶ by chance."""


def noise(
    shapes: list[tuple[int, ...]], s: float = -0.5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """What is added to gradients that are zero."""
    gradients = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    AgreementNoise(GAMMA)(gradients, Descent(torch.tensor(s, dtype=torch.float64), Step(seed=seed)))
    return gradients


@pytest.mark.parametrize("s", [-1.0, -0.5, 0.9])
def test_noise_is_normal_with_standard_deviation_beta(s):
    beta = GAMMA * (1 - s)
    (drawn,) = noise([(N,)], s)
    assert abs(drawn.mean().item()) < SIGMAS * beta / math.sqrt(N)
    assert abs(drawn.std().item() - beta) < SIGMAS * beta / math.sqrt(2 * N)
    # A normal variable is within one standard deviation with probability .6827; the share's own error is √(pq/N).
    inside = (drawn.abs() < beta).double().mean().item()
    assert abs(inside - 0.6827) < SIGMAS * math.sqrt(0.6827 * 0.3173 / N)


def test_noise_of_different_tensors_is_independent():
    a, b = noise([(N // 2, 2), (N,)])
    assert abs(torch.corrcoef(torch.stack([a.reshape(-1), b]))[0, 1].item()) < SIGMAS / math.sqrt(N)


def test_noise_is_added_to_the_gradient():
    (drawn,) = noise([(50,)])
    gradient = matrix(50)
    expected = gradient + drawn
    AgreementNoise(GAMMA)([gradient], Descent(torch.tensor(-0.5, dtype=torch.float64)))
    assert_same_bits([gradient], [expected])


def test_noise_scale_is_reported():
    facts = AgreementNoise(GAMMA)([matrix(3)], Descent(torch.tensor(-0.6, dtype=torch.float64)))
    assert facts.keys() == {"noise_scale"}
    assert facts["noise_scale"].item() == pytest.approx(0.16, rel=1e-12)  # fp64


def test_same_seed_same_bits_another_step_other_noise():
    shapes = [(7, 3), (5,), ()]
    first = noise(shapes, seed=step_seed(42, 7))
    torch.manual_seed(123)  # the global generators have no say
    torch.rand(10)
    assert_same_bits(noise(shapes, seed=step_seed(42, 7)), first)
    for other in (step_seed(42, 8), step_seed(43, 7)):
        assert all((a != b).any() for a, b in zip(noise(shapes, seed=other), first, strict=True))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise([(100,)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_keep_their_dtype(dtype):
    (drawn,) = noise([(N,)], dtype=dtype)
    assert drawn.dtype == dtype
    # Rounding to bf16 moves an entry by up to 2⁻⁹ of itself, to both sides: the deviation moves by far less.
    assert drawn.double().std().item() == pytest.approx(GAMMA * 1.5, rel=SIGMAS / math.sqrt(2 * N) + 1e-3)


def test_no_gamma_no_change():
    gradients = [matrix(4, 3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    gradients.append(torch.tensor([-0.0, math.nan, math.inf]))
    before = [g.clone() for g in gradients]
    facts = AgreementNoise(0.0)(gradients, Descent(torch.tensor(-1.0)))
    assert_same_bits(gradients, before)
    assert facts["noise_scale"] == 0


def test_full_agreement_no_change():
    gradient = matrix(20)
    before = gradient.clone()
    AgreementNoise(GAMMA)([gradient], Descent(torch.ones((), dtype=torch.float64)))
    assert_same_bits([gradient], [before])


@pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
def test_bad_gamma_is_refused_at_once(gamma):
    with pytest.raises(ValueError, match="gamma"):
        AgreementNoise(gamma)


# ---- Drawing again ----


def test_step_seeds_are_all_different_and_fit_a_generator():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(500)}
    assert len(seeds) == 20 * 500
    assert step_seed(1, 23) != step_seed(12, 3)
    assert all(0 <= s < 2**63 for s in seeds)


def test_step_seeds_are_the_same_in_every_process():
    assert step_seed(42, 1000) == 5823962135305401918  # another value breaks resuming older runs (law 4)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_same_dropout_repeats_the_masks(micro_batches):
    model = network_with(nn.Dropout(0.5))
    parts = parts_of(model, batch().permuted(), micro_batches)
    same = two_pass_step(model, parts, sam(1e-12), same_dropout=True)
    other = two_pass_step(model, parts, sam(1e-12), same_dropout=False)
    assert same.perturbed_loss.item() == pytest.approx(same.loss.item(), rel=1e-9)  # |ε| = 1e-12
    assert abs(other.perturbed_loss.item() - other.loss.item()) > 1e-3  # other masks: a first-digit change


def test_random_numbers_go_on_after_a_step_with_the_same_dropout():
    ends = []
    for method in (sam(0.05), erm()):
        torch.manual_seed(3)
        model = network_with(nn.Dropout(0.5))
        two_pass_step(model, parts_of(model, batch()), method, same_dropout=True)
        ends.append(torch.rand(4))
    assert_same_bits([ends[0]], [ends[1]])


def test_random_states_are_those_of_torch_numpy_and_python():
    def draw() -> tuple[list[float], list[float], float]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    state = RandomState.capture()
    first, second = draw(), draw()
    assert first != second
    state.restore()
    assert (draw(), draw()) == (first, second)
