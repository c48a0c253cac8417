"""Law 3 for methods by name: two processes are one with the same global batch, and stay the same bits."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_same_bits
from rank_worker import RANKS, Ranks, on_two_ranks
from rank_worker_methods import OF_FEATURES, TRAINED, own_gradient
from test_ranks import assert_same_bits_everywhere, differences
from training import flat, vit

pytestmark = pytest.mark.slow

ROUND_OFF = 1e-4
"""Of fp32 sums taken in another order, relative to the way of the weights; GAM's differences and power iterations
enlarge it."""


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return on_two_ranks("rank_worker_methods", tmp_path_factory)


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_are_one_process(name, two_ranks):
    outcomes, alone = two_ranks[name], TRAINED[name]()
    assert_same_bits_everywhere(outcomes)
    assert max(differences(outcomes[0]["weights"], alone["weights"], flat(vit()))) <= ROUND_OFF
    for entry, other in zip(outcomes[0]["log"], alone["log"], strict=True):
        # cosine_change is a small difference over a small number
        found = {key: value for key, value in entry.items() if key != "cosine_change"}
        assert found == pytest.approx({key: other[key] for key in found}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_without_a_reduction_each_rank_takes_the_objective_of_its_own_rows(name, two_ranks):
    found = [outcome["gradient"] for outcome in two_ranks[f"{name}, each for itself"]]
    for rank in range(RANKS):
        assert_same_bits(found[rank], own_gradient(name, rank), name)
    assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))  # they have rows of their own
