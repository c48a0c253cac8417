"""The perturbation family through the whole engine: each rule as published, law 7, order, memory, costs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import restated
import torch
from assertions import assert_close, assert_same_bits
from problems import SIZES, Batch, Counter, batch, gradients, network, parts_of, values
from restated import LEARNING_RATE, Plain
from torch import Tensor, nn

from hf_sage.engine import Part, Step, StepReport, descend, two_pass_step
from hf_sage.methods import (
    METHODS,
    Method,
    align_asam,
    align_sam,
    asam,
    disam,
    eigen_sam,
    friendly_sam,
    gam,
    gga_l,
    gsam,
    look_sam,
    sage,
    sage_no_noise,
    sage_no_polar,
    sage_no_scale,
    sagm,
    sam,
    sgld,
    vasso,
    x_sam,
)

RHO, GAMMA = 0.05, 0.1
CASES: dict[str, tuple[Method, Callable[[Plain], restated.Rule]]] = {
    "sam": (sam(RHO), lambda w: restated.sam(w, RHO)),
    "asam": (asam(0.5, 0.01), lambda w: restated.asam(w, 0.5, 0.01)),
    "asam, matrices": (asam(0.5, 0.1, "matrices"), lambda w: restated.asam(w, 0.5, 0.1, "matrices")),
    "gsam": (gsam(RHO, 0.4), lambda w: restated.gsam(w, RHO, 0.4)),
    "gam": (gam(0.02, 0.2, 0.3), lambda w: restated.gam(w, 0.02, 0.2, 0.3)),
    "sagm": (sagm(RHO, 0.3), lambda w: restated.sagm(w, RHO, 0.3)),
    "disam": (disam(RHO, 0.5), lambda w: restated.disam(w, RHO, 0.5)),
    "disam, samples": (disam(RHO, 0.5, "samples"), lambda w: restated.disam(w, RHO, 0.5, "samples")),
    "friendly_sam": (friendly_sam(0.2, 0.6, 0.9), lambda w: restated.friendly_sam(w, 0.2, 0.6, 0.9)),
    "look_sam": (look_sam(RHO, 0.7, 3), lambda w: restated.look_sam(w, RHO, 0.7, 3)),
    "vasso": (vasso(RHO, 0.3), lambda w: restated.vasso(w, RHO, 0.3)),
    "align_sam": (align_sam(RHO, 2.0, 2), lambda w: restated.align(w, RHO, 2.0)),
    "align_asam": (align_asam(0.5, 2.0, 0.01, 0), lambda w: restated.align(w, 0.5, 2.0, 0.01)),
    "x_sam": (x_sam(RHO, 0.8, 3, 5), lambda w: restated.x_sam(w, RHO, 0.8, 3, 5)),
    "x_sam, literal": (x_sam(RHO, 0.8, 2, 4, "literal"), lambda w: restated.x_sam(w, RHO, 0.8, 2, 4, "literal")),
    "eigen_sam": (eigen_sam(RHO, 0.9, 3, 5), lambda w: restated.eigen_sam(w, RHO, 0.9, 3, 5)),
    "sage": (sage(RHO, GAMMA, polar="svd"), lambda w: restated.sage(w, RHO, GAMMA)),
    "sage_no_polar": (sage_no_polar(RHO, GAMMA), lambda w: restated.sage(w, RHO, GAMMA, polar=False)),
    "sage_no_scale": (sage_no_scale(RHO, GAMMA, polar="svd"), lambda w: restated.sage(w, RHO, GAMMA, scale=False)),
    "sage_no_noise": (sage_no_noise(RHO, polar="svd"), lambda w: restated.sage(w, RHO)),
    "gga_l": (gga_l(GAMMA), lambda w: restated.sage(w, 0.0, GAMMA, perturbs=False)),
    "sgld": (sgld(1e-3), lambda w: restated.sgld(w, 1e-3)),
}
NOISY = {"sage", "sage_no_polar", "sage_no_scale", "gga_l", "sgld"}
"""Noise is added to the gradient after the loss scale was taken off it."""

ROUND_OFF = 1e-10
"""fp64, the same sums in another order, times what a difference of two gradients (GAM) makes of it."""

cases = pytest.mark.parametrize("name", CASES)


def data_of(number: int, sizes: dict[str, int] = SIZES) -> tuple[Batch, Batch]:
    """The batch and the auxiliary batch of an update."""
    return batch(sizes=sizes, seed=number), batch(sizes={"photo": 2, "art": 1}, seed=1000 + number)


def update(
    model: nn.Module,
    method: Method,
    number: int,
    memories: dict[str, Any],
    *,
    sizes: dict[str, int] = SIZES,
    arrange: Callable[[list[Part]], list[Part]] = lambda parts: parts,
    micro_batches: int = 1,
    loss_scale: Callable[[int], float] = lambda _: 1.0,
    factor: float = 1.0,
) -> tuple[StepReport, dict[str, Tensor]]:
    """One update by SGD; the gradients stay in place."""
    data, auxiliary = data_of(number, sizes)
    scale = loss_scale(number)
    parts = arrange(parts_of(model, data, micro_batches))
    parts = [Part(p.group, p.weight, lambda p=p: factor * p.loss()) for p in parts]
    step = Step(number=number, seed=number, learning_rate=LEARNING_RATE, gradient_scale=scale)
    for p in model.parameters():
        p.grad = None
    report = two_pass_step(
        model,
        parts,
        method,
        step=step,
        memories=memories,
        auxiliary=parts_of(model, auxiliary),
        backward=lambda loss: (loss * scale).backward(),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.grad.div_(scale)
        facts = descend(model, method, report, step)
        for p in model.parameters():
            p.sub_(LEARNING_RATE * p.grad)
    if report.look_back is not None:
        facts |= report.look_back()
    return report, facts


def run(method: Method, updates: int = 5, **options: Any) -> nn.Module:
    model, memories = network(), {}
    for number in range(updates):
        update(model, method, number, memories, **options)
    return model


# ---- Law 8: the published rules ----


@cases
def test_a_rule_is_that_of_its_paper(name):
    method, restatement = CASES[name]
    model, memories = network(), {}
    plain = Plain(network())
    rule, theta = restatement(plain), plain.start
    for number in range(5):
        expected = rule(theta, *data_of(number), number)
        theta = theta - LEARNING_RATE * expected
        update(model, method, number, memories)
        assert_close([torch.cat([g.reshape(-1) for g in gradients(model)])], [expected], 1e-8)  # law 8
    assert_close([torch.cat([p.reshape(-1) for p in values(model)])], [theta], 1e-8)


def test_every_method_of_the_family_is_restated():
    assert set(FAMILY) - {"erm"} <= set(CASES)


# ---- Laws 6 and 7: order, scale ----


@cases
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"arrange": lambda parts: parts[::-1]}, id="groups reversed"),
        pytest.param({"micro_batches": 3}, id="three micro-batches"),
    ],
)
def test_order_and_micro_batches_do_not_matter(name, options):
    method = CASES[name][0]
    assert_close(values(run(method, **options)), values(run(method)), ROUND_OFF)


@cases
def test_the_loss_scale_is_gone_from_the_update(name):
    """A GradScaler's, which changes: a rule with a constant of its own or with a memory must divide by it."""
    method = CASES[name][0]
    assert_close(
        values(run(method, loss_scale=lambda number: 2.0 ** (16 - 3 * number))), values(run(method)), ROUND_OFF
    )


SCALE_FREE = set(CASES) - NOISY - {"sagm", "disam", "disam, samples", "x_sam, literal"}
"""SAGM's α and DISAM's λ are in units of the loss."""


@pytest.mark.parametrize("name", sorted(SCALE_FREE))
def test_a_loss_in_other_units_scales_the_gradient(name):
    method = CASES[name][0]
    found = []
    for factor in (1.0, 1e-3):
        model = network()
        update(model, method, 0, {}, factor=factor)
        found.append([g / factor for g in gradients(model)])
    assert_close(found[1], found[0], 1e-8)


# ---- Degenerate batches ----


@cases
def test_zero_gradients_stay_finite(name):
    model, memories = network(), {}
    before = values(model)
    for number in range(4):
        update(model, CASES[name][0], number, memories, factor=0.0)
        assert all(g.isfinite().all() for g in gradients(model))
    if name not in NOISY:
        assert_same_bits(values(model), before)
    update(model, CASES[name][0], 4, memories)  # and what they left in the memory does no harm
    assert all(p.isfinite().all() for p in values(model))


@cases
def test_a_group_may_be_missing(name):
    model, memories = network(), {}
    for number, sizes in enumerate([SIZES, {"photo": 4}, {"photo": 3, "art": 3}, SIZES]):
        update(model, CASES[name][0], number, memories, sizes=sizes)
        assert all(p.isfinite().all() for p in values(model))


# ---- Memory ----


def reloaded(memories: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(memories, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@cases
def test_a_saved_memory_goes_on_bit_by_bit(name):
    method = CASES[name][0]
    model, memories = network(), {}
    for number in range(6):
        update(model, method, number, memories)
        memories = reloaded(memories)
    assert_same_bits(values(model), values(run(method, 6)))
    assert bool(any(memories.values())) == ("memory" in method.needs)


@pytest.mark.parametrize("name", [name for name, (method, _) in CASES.items() if "memory" in method.needs])
def test_without_its_memory_a_rule_goes_elsewhere(name):
    """Or the test above would show nothing."""
    method = CASES[name][0]
    model = network()
    for number in range(6):
        update(model, method, number, {})
    assert (values(model)[0] - values(run(method, 6))[0]).abs().max() > 1e-9


@cases
def test_what_is_remembered_is_never_written_to(name):
    model, memories = network(), {}
    for number in range(4):
        kept = reloaded(memories)
        held = {k: dict(m) for k, m in memories.items()}
        update(model, CASES[name][0], number, memories)
        for rule, memory in held.items():
            for key, value in memory.items():
                if isinstance(value, list):
                    assert_same_bits(value, kept[rule][key], key)


@pytest.mark.parametrize("name", [name for name, (method, _) in CASES.items() if "memory" in method.needs])
def test_a_memory_of_other_parameters_is_dropped(name):
    model, memories = network(), {}
    update(model, CASES[name][0], 0, memories)
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    for number in (1, 2, 3):
        data, auxiliary = data_of(number)
        two_pass_step(
            model,
            parts_of(model, data),
            CASES[name][0],
            step=Step(number=number),
            memories=memories,
            auxiliary=parts_of(model, auxiliary),
        )
        assert all(g.isfinite().all() for g in gradients(model))


# ---- Costs ----

SHORT = {
    "look_sam": {"interval": 3},
    "x_sam": {"interval": 3, "iterations": 2},
    "eigen_sam": {"interval": 4, "iterations": 2},
    "align_sam": {"look_back_interval": 4},
    "align_asam": {"look_back_interval": 3},
}
"""Intervals of which 12 updates are whole periods."""


FAMILY = [n for n in METHODS if METHODS[n]().hook is None and METHODS[n]().objective is None]


IN_STEP = [name for name in FAMILY if name not in ("eigen_sam", "align_sam", "align_asam")]
"""Those without an interval of their own, which need not fit another one."""


@pytest.mark.parametrize(("name", "interval"), [*((n, None) for n in FAMILY), *((n, 3) for n in IN_STEP)])
def test_a_rule_costs_what_the_listing_says(name, interval):
    method = METHODS[name](**SHORT.get(name, {}))
    if interval is not None:
        method = replace(method, ascent_interval=interval)
    model, memories, updates = network(), {}, 12
    apart = network()  # the auxiliary batch's rows are counted apart, in a copy of the network that shares its weights
    for own, shared in zip(apart.modules(), model.modules(), strict=True):
        own._parameters = shared._parameters
    counted, auxiliary = Counter(model), Counter(apart)
    for number in range(updates):
        data, other = data_of(number)
        report = two_pass_step(
            model,
            parts_of(model, data),
            method,
            step=Step(number=number, seed=number, learning_rate=LEARNING_RATE),
            memories=memories,
            auxiliary=parts_of(apart, other),
        )
        descend(model, method, report, Step(number=number, learning_rate=LEARNING_RATE))
        if report.look_back is not None:
            report.look_back()
    rows, auxiliary_rows = (updates * len(b.groups) for b in data_of(0))
    assert counted.forwards / rows == pytest.approx(method.forwards)
    assert counted.backwards / rows == pytest.approx(method.backwards)
    assert auxiliary.forwards / auxiliary_rows == pytest.approx(method.auxiliary_passes)
    assert auxiliary.backwards / auxiliary_rows == pytest.approx(method.auxiliary_passes)


def test_costs_by_default():
    costs = {name: (METHODS[name]().forwards, METHODS[name]().backwards) for name in ("erm", "sam", "gam", "sgld")}
    assert costs == {"erm": (1, 1), "sam": (2, 2), "gam": (4, 4), "sgld": (1, 1)}
    assert METHODS["look_sam"]().passes == pytest.approx(1.2)
    x = METHODS["x_sam"]()
    assert (x.forwards, x.backwards) == pytest.approx((2 + 5 / 3, 2 + 10 / 3))
    assert METHODS["align_sam"](look_back_interval=0).auxiliary_passes == 2


# ---- What is logged ----


def test_align_sam_reports_the_cosines_of_its_paper():
    model, plain = network(), Plain(network())
    theta = plain.start
    data, auxiliary = data_of(0)

    def cosine(at: Tensor) -> float:
        g_a = plain.gradient(at, auxiliary)
        g_a = plain.gradient(at + RHO * g_a / g_a.norm(), auxiliary)
        g_t = plain.gradient(at, data)
        return (g_t @ g_a / (g_t.norm() * g_a.norm())).item()

    _, facts = update(model, align_sam(RHO, 2.0, 2), 0, {})
    before, after = cosine(theta), cosine(torch.cat([p.reshape(-1) for p in values(model)]))
    expected = {"cosine_before": before, "cosine_after": after, "cosine_change": (after - before) / after}
    assert {name: value.item() for name, value in facts.items()} == pytest.approx(expected, rel=1e-8)
    _, facts = update(model, align_sam(RHO, 2.0, 2), 1, {})
    assert facts.keys() == {"cosine_before"}


def test_looking_back_changes_nothing():
    assert_same_bits(values(run(align_sam(RHO, 2.0, 1))), values(run(align_sam(RHO, 2.0, 0))))


@pytest.mark.parametrize("method", [x_sam(RHO, 0.5, 2, 40), eigen_sam(RHO, 0.5, 2, 40)])
def test_the_largest_eigenvalue_is_reported_where_it_was_found(method):
    model, plain, memories = network(), Plain(network()), {}
    _, facts = update(model, method, 0, memories)
    expected = torch.linalg.eigvalsh(plain.hessian(plain.start, data_of(0)[0]))[-1].item()
    assert facts["hessian_eigenvalue"].item() == pytest.approx(expected, rel=1e-3)  # 40 iterations
    assert "hessian_eigenvalue" not in update(model, method, 1, memories)[1]


def test_noise_of_sgld_waits_for_a_learning_rate():
    model, data = network(), batch()
    step = Step(learning_rate=0.0)
    report = two_pass_step(model, parts_of(model, data), sgld(1.0), step=step)
    before = gradients(model)
    descend(model, sgld(1.0), report, step)
    assert_same_bits(gradients(model), before)


# ---- Hyperparameters ----


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (asam, {"eta": -1}),
        (asam, {"scaled": "weights"}),
        (gsam, {"alpha": -0.1}),
        (gam, {"norm_rho": math.inf}),
        (gam, {"alpha": math.nan}),
        (sagm, {"alpha": -1}),
        (disam, {"variance_weight": -1}),
        (disam, {"variance": "domains"}),
        (friendly_sam, {"decay": 1.0}),
        (friendly_sam, {"sigma": math.nan}),
        (vasso, {"theta": 0.0}),
        (look_sam, {"alpha": -1}),
        (align_sam, {"trade_off": 0}),
        (align_sam, {"look_back_interval": -1}),
        (align_asam, {"eta": -1}),
        (x_sam, {"alpha": 2.1}),
        (x_sam, {"variant": "signed"}),
        (x_sam, {"interval": 0}),
        (eigen_sam, {"iterations": 0}),
        (eigen_sam, {"alpha": -1}),
        (sage_no_polar, {"bias_radius": "none"}),
        (sgld, {"temperature": -1}),
    ],
)
def test_bad_hyperparameters_are_refused(build, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build(**wrong)


@pytest.mark.parametrize("name", [n for n in METHODS if "rho" in METHODS[n].__code__.co_varnames])
def test_a_bad_radius_is_refused(name):
    with pytest.raises(ValueError, match="rho"):
        METHODS[name](rho=-1.0)
