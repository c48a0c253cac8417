"""The engine: one step against Algorithm 1 (law 8), bit-exact restore (law 5), same math in any order (law 6)."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_same_bits, same_bits
from problems import (
    SIZES,
    Algorithm1,
    Batch,
    batch,
    generator,
    gradients,
    network,
    network_with,
    part,
    parts_of,
    values,
    watched,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_sage.ascents import Ascent
from hf_sage.engine import Part, Step, StepReport, clean_pass, descend, perturbed, two_pass_step
from hf_sage.methods import Method, erm, sage, sam

RHO, GAMMA, SEED = 0.05, 0.3, 11
SAGE, SAM = sage(RHO, GAMMA, polar="svd"), sam(RHO)
METHODS = [pytest.param(SAGE, id="sage"), pytest.param(SAM, id="sam")]
ROUND_OFF = 1e-12
"""fp64, the same sums in another order."""


def step(model: nn.Module, data: Batch, method: Method, **options) -> StepReport:
    return two_pass_step(model, parts_of(model, data), method, **options)


# ---- Law 8: the published rule ----


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_paper(method):
    model, data = network(), batch()
    expected = Algorithm1(model, data, RHO, GAMMA, spectral=method is SAGE)
    report = step(model, data, method)
    scalars = [report.loss, report.perturbed_loss, report.agreement, report.perturbation_norm]
    norm = torch.cat([e.reshape(-1) for e in expected.epsilon]).norm()
    assert_close(scalars, [expected.loss, expected.perturbed_loss, expected.agreement, norm], 1e-8)  # law 8
    assert_close(gradients(model), expected.gradient, 1e-8)
    for name, loss in expected.group_losses.items():
        total, weight = report.group_losses[name]
        assert (total / weight).item() == pytest.approx(loss.item(), rel=1e-8)
        assert weight == pytest.approx(SIZES[name] / sum(SIZES.values()), rel=ROUND_OFF)

    facts = descend(model, method, report, Step(seed=SEED))
    draws = generator(SEED)
    beta = expected.beta if method is SAGE else 0.0
    noise = [beta * torch.randn(g.shape, dtype=g.dtype, generator=draws) for g in expected.gradient]
    assert_close(gradients(model), [g + n for g, n in zip(expected.gradient, noise, strict=True)], 1e-8)
    assert_close(facts.values(), [beta] if method is SAGE else [], 1e-8)


# ---- Law 5: restore ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("raises", [False, True])
def test_parameters_are_the_same_bits_after_the_step(method, dtype, raises):
    model, data = network(dtype), batch(dtype)
    before, calls = values(model), len(SIZES)

    def fail_late(*_: object) -> None:
        if raises and len(seen) > calls + 1:
            raise KeyboardInterrupt

    with watched(model) as seen:
        model.register_forward_pre_hook(fail_late)
        try:
            step(model, data, method)
        except KeyboardInterrupt:
            assert raises
            assert not gradients(model)
    assert_same_bits(values(model), before, "parameter")
    assert len(seen) == calls + (2 if raises else calls)
    for theta in seen[:calls]:
        assert_same_bits(theta, before, "parameter in the clean pass")
    for theta in seen[calls:]:
        assert not all(same_bits(p, q) for p, q in zip(theta, before, strict=True)), "θ did not move"


def test_parameters_are_the_same_bits_when_the_ascent_itself_fails():
    """As when memory ends between two additions: here the second ε does not fit."""
    parameters = [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError), perturbed(parameters, [torch.ones(2), torch.ones(4)]):
        pass
    assert_same_bits(parameters, [torch.ones(2), torch.ones(3)], "parameter")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_gradient_remains(method):
    remembered: list[weakref.ref] = []

    @dataclass(frozen=True)
    class Remembering(Ascent):
        rho: float = RHO

        def __call__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Any = None) -> list[Tensor]:
            epsilon = method.ascent(parameters, gradients)
            remembered.extend(weakref.ref(t) for t in [*gradients, *epsilon])
            return epsilon

    model, data = network(), batch()
    attributes = [sorted(vars(m)) for m in model.modules()]
    report = step(model, data, replace(method, ascent=Remembering()))
    gc.collect()
    assert len(remembered) == 2 * len(values(model))
    assert not any(reference() is not None for reference in remembered)
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert report.loss.grad_fn is None
    assert report.perturbed_loss.grad_fn is None


# ---- Law 6: same math in any order ----


def names(data: Batch) -> Batch:
    return data.renamed({"photo": "z", "sketch": "a", "art": "m"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(lambda model, data: parts_of(model, data)[::-1], id="groups reversed"),
        pytest.param(lambda model, data: parts_of(model, names(data)), id="groups renamed"),
        pytest.param(lambda model, data: parts_of(model, data.permuted()), id="rows permuted"),
        pytest.param(lambda model, data: parts_of(model, data.permuted(), 2), id="two micro-batches"),
        pytest.param(lambda model, data: parts_of(model, names(data.permuted()), 10), id="one row a micro-batch"),
    ],
)
def test_order_names_and_micro_batches_do_not_matter(method, variant):
    model, other, data = network(), network(), batch()
    report, found = step(model, data, method), two_pass_step(other, variant(other, data), method)
    assert_close(gradients(other), gradients(model), ROUND_OFF)
    for field_ in ("loss", "perturbed_loss", "agreement", "perturbation_norm"):
        assert getattr(found, field_).item() == pytest.approx(getattr(report, field_).item(), rel=ROUND_OFF)


def test_mean_gradient_is_that_of_one_pass_over_the_batch():
    model, data = network(), batch()
    clean = clean_pass(list(model.parameters()), parts_of(model, data, 3), Tensor.backward)
    one_pass = torch.autograd.grad(cross_entropy(model(data.x), data.y), list(model.parameters()))
    assert_close(clean.gradient, one_pass, ROUND_OFF)
    assert not gradients(model)


@pytest.mark.parametrize("method", METHODS)
def test_loss_scale_changes_no_bit_of_the_perturbation(method):
    model, scaled = network(torch.float32), network(torch.float32)
    data = batch(torch.float32)
    report = step(model, data, method)
    found = step(scaled, data, method, backward=lambda loss: (loss * 2**16).backward())
    assert_same_bits([g / 2**16 for g in gradients(scaled)], gradients(model), "gradient")
    assert_same_bits([found.agreement, found.perturbed_loss], [report.agreement, report.perturbed_loss])


# ---- What a pass touches ----


@pytest.mark.parametrize(
    ("method", "passes"), [(SAGE, 2), (SAM, 2), (sage(0.0, GAMMA), 1), (sage(RHO, 0.0), 2), (sam(0.0), 1), (erm(), 1)]
)
def test_two_passes_a_group_or_one_without_a_radius(method, passes):
    model, data = network(), batch()
    with watched(model) as seen:
        report = step(model, data, method)
    assert len(seen) == passes * len(SIZES)
    assert (report.perturbed_loss is not None) == (report.perturbation_norm is not None) == (passes == 2)
    if passes == 1:
        one_pass = torch.autograd.grad(cross_entropy(model(data.x), data.y), list(model.parameters()))
        assert_close(gradients(model), one_pass, ROUND_OFF)


@pytest.mark.parametrize("method", [*METHODS, pytest.param(erm(), id="erm")])
def test_gradients_add_to_those_that_were_there(method):
    model, data = network(), batch()
    step(model, data, method)
    first = gradients(model)
    step(model, data, method)  # θ has not moved: the same gradient again
    assert_close(gradients(model), [2 * g for g in first], ROUND_OFF)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_and_unused_parameters_are_left_alone(method):
    model, data = network(), batch()
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    before = dict(zip(dict(model.named_parameters()), values(model), strict=True))
    with watched(model) as seen:
        report = step(model, data, method)
    descend(model, method, report, Step(seed=SEED))
    for name, later in zip(before, seen[-1], strict=True):
        assert same_bits(later, before[name]) == (name in ("0.weight", "unused")), name
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"0.weight", "unused"}


def test_shared_parameters_are_perturbed_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 9, bias=False)).double()
    model[3].weight = model[1].weight
    before = model[1].weight.detach().clone()
    with watched(model) as seen:
        step(model, batch(), SAM)
    ((moved,),) = seen[-1:]
    assert (moved - before).norm().item() == pytest.approx(RHO, rel=ROUND_OFF)


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten())


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: nn.BatchNorm1d(8), id="batch norm"),
        pytest.param(lambda: nn.BatchNorm1d(8, momentum=None), id="cumulative batch norm"),
        pytest.param(instance_norm, id="instance norm"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_those_of_the_clean_pass(layer, training):
    model, once, data = network_with(layer()).train(training), network_with(layer()).train(training), batch()
    start, settings = [b.clone() for b in model.buffers()], [m.training for m in model.modules()]
    step(model, data, SAM)
    step(once, data, erm())
    assert_same_bits(model.buffers(), once.buffers(), "buffer")
    assert all(same_bits(a, b) for a, b in zip(model.buffers(), start, strict=True)) == (not training)
    assert [m.training for m in model.modules()] == settings
    # The statistics move again with the next clean pass: nothing stays switched off.
    step(model, data, erm())
    step(once, data, erm())
    assert_same_bits(model.buffers(), once.buffers(), "buffer")


def test_batch_norm_uses_batch_statistics_in_both_passes():
    model = network_with(nn.BatchNorm1d(8))
    report = step(model, batch(), sam(1e-12))
    # A first-order change of 1e-12; running statistics would change the loss in its first digits.
    assert report.perturbed_loss.item() == pytest.approx(report.loss.item(), rel=1e-9)


# ---- Precision ----


def test_autocast_around_the_step_does_not_hide_the_perturbation():
    """Autocast keeps its casts of the weights until its outermost context ends: here between the two passes."""
    data, inside, around = batch(torch.float32), network(torch.float32), network(torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(inside(data.x), data.y)

    expected = two_pass_step(inside, [Part("all", 1.0, loss)], sam(0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = two_pass_step(around, [part(around, "all", data.x, data.y, 1.0)], sam(0.5))
    assert expected.perturbed_loss > expected.loss
    assert_same_bits([report.loss, report.perturbed_loss], [expected.loss, expected.perturbed_loss])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_perturbation_out(method, bad):
    model, data = network(), batch()
    before, parts = values(model), parts_of(model, data)
    sound = parts[1].loss
    parts[1] = replace(parts[1], loss=lambda: sound() * bad)
    with watched(model) as seen:
        report = two_pass_step(model, parts, method)
    assert not report.is_finite
    assert (report.perturbed_loss, report.perturbation_norm, len(seen)) == (None, None, len(parts))
    assert_same_bits(values(model), before, "parameter")
    assert not all(g.isfinite().all() for g in gradients(model))  # for a GradScaler to see


# ---- Refusals and layers ----


def test_a_step_needs_parts_and_parameters():
    model, data = network(), batch()
    with pytest.raises(ValueError, match="at least one part"):
        two_pass_step(model, [], SAGE)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="one parameter"):
        step(model, data, SAGE)


def test_mathematics_and_engine_import_torch_alone():
    modules = ["hf_sage.polar", "hf_sage.agreement", "hf_sage.engine", "hf_sage.methods"]
    heavy = "{'transformers', 'accelerate', 'datasets', 'evaluate'}"
    code = f"import sys\nfor m in {modules}:\n __import__(m)\n print(m, *{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == modules
