"""The step on parameters that FSDP2 has sharded over two ranks is that of one process which holds them whole.

Two processes run all cases of `rank_worker_sharding` in one launch; here they are compared with one process.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from assertions import assert_close, assert_same_bits
from rank_worker import Outcome, Ranks, on_two_ranks
from rank_worker_sharding import ALIKE, LAYOUTS, METHODS, SIZES
from training import Rows, build, image_rows, vit

ROUND_OFF = 1e-10
"""Of fp64 sums taken in another order, after three updates by Adam, which divides by the gradient's size."""

LAYOUTS_AND_METHODS = [f"{layout}, {method}" for layout in LAYOUTS for method in ("sage", "sam")]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return on_two_ranks("rank_worker_sharding", tmp_path_factory)


@cache
def alone(name: str, method: str) -> Outcome:
    """One process, nothing sharded."""
    return ALIKE[name][0](lambda model: model, METHODS[method])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method"),
    [*product(LAYOUTS, METHODS), ("never resharded", "sage"), ("never resharded", "sam")],
)
def test_two_ranks_with_shards_are_one_process(layout, method, two_ranks):
    expected = alone("trained", method)["steps"]
    for own in two_ranks[f"trained, {layout}, {method}"]:
        for found, other in zip(own["steps"], expected, strict=True):
            for what in ("gradient", "noisy", "theta"):
                assert_close(found[what], other[what], ROUND_OFF, what)
            assert set(found["facts"]) == set(other["facts"])
            for name, value in other["facts"].items():
                assert float(found["facts"][name]) == pytest.approx(float(value), rel=ROUND_OFF), name


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS_AND_METHODS)
def test_epsilon_is_that_of_whole_matrices(case, two_ranks):
    expected = alone("ascent", case.rpartition(" ")[2])
    for own in two_ranks[f"ascent, {case}"]:
        assert_close(own["epsilon"], expected["epsilon"], ROUND_OFF, "ε")
        assert_same_bits(own["after"], own["before"], "shard of a parameter")


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS_AND_METHODS)
def test_a_matrix_is_gathered_once_and_no_more_of_it_is_kept_than_the_shard(case, two_ranks):
    for own in two_ranks[f"ascent, {case}"]:
        gathers = own["matrices"] if "sage" in case and "replicas" not in case else 0
        assert own["gathered"] == gathers
        assert all(memory == size for size, memory in own["kept"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_that_of_one_process_to_the_bit(layout, two_ranks):
    expected = alone("noise", "sage")["noise"]
    assert all(noise.abs().max() > 0 for noise in expected)
    for own in two_ranks[f"noise, {layout}, sage"]:
        assert_same_bits(own["noise"], expected, "noise")


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS_AND_METHODS)
def test_shards_are_the_same_bits_when_the_second_pass_raises(case, two_ranks):
    expected = alone("raised", case.rpartition(" ")[2])
    for own in two_ranks[f"raised, {case}"]:
        assert own["passes"] == expected["passes"] == len(SIZES) + 2
        assert own["sharded"], "whole parameters, θ + ε, were left behind"
        assert_same_bits(own["after"], own["before"], "shard of a parameter")
        assert_close(own["gradient"], expected["gradient"], ROUND_OFF, "gradient of the next step")


@pytest.mark.slow
def test_gram_matrix_counts_each_entry_once_however_it_is_laid_out(two_ranks):
    for own in two_ranks["gram"]:
        assert_close([own["found"]], [own["expected"]], 1e-14)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_leaves_the_perturbation_out_on_both(two_ranks):
    for own in two_ranks["broken"]:
        assert not own["is_finite"]
        assert own["passes"] == own["groups"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [("different groups", "parts of different groups.*weight 0"), ("partly sharded", "2 of 10 parameters are sharded")],
)
def test_what_would_hang_or_differ_is_refused_on_both_ranks(case, message, two_ranks):
    for own in two_ranks[case]:
        assert re.search(message, own["message"])


# ---- The trainer ----


@pytest.mark.parametrize("method", ["sage", "sam"])
@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_the_trainer_refuses_shards_and_names_the_alternative(kind, method, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=rf"{method.upper()}.*(?i:{kind}).*DistributedDataParallel.*accelerate launch"):
        build(vit(), Rows(image_rows()), method=method)


@pytest.mark.parametrize("options", [{"method": "erm"}, {"method": "sage", "rho": 0.0, "gamma": 0.0}])
@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_where_there_is_no_second_pass_nothing_is_refused(kind, options, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    build(vit(), Rows(image_rows()), **options)
