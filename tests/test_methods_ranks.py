"""Law 3 for methods by name: two processes are one with the same global batch, and stay the same bits."""

from __future__ import annotations

import pytest
from rank_worker import Ranks, on_two_ranks
from rank_worker_methods import CASES
from test_ranks import assert_same_bits_everywhere, differences
from training import flat, vit

pytestmark = pytest.mark.slow

ROUND_OFF = 1e-4
"""Of fp32 sums taken in another order, relative to the way of the weights; GAM's differences and power iterations
enlarge it."""


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return on_two_ranks("rank_worker_methods", tmp_path_factory)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name, two_ranks):
    outcomes, alone = two_ranks[name], CASES[name]()
    assert_same_bits_everywhere(outcomes)
    assert max(differences(outcomes[0]["weights"], alone["weights"], flat(vit()))) <= ROUND_OFF
    for entry, other in zip(outcomes[0]["log"], alone["log"], strict=True):
        # cosine_change is a small difference over a small number
        found = {key: value for key, value in entry.items() if key != "cosine_change"}
        assert found == pytest.approx({key: other[key] for key in found}, rel=1e-3, abs=1e-5)
