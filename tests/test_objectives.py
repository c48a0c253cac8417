"""Objectives and hooks: each against a plain fp64 re-statement of its published rule, through the whole step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from problems import Batch, Counter, batch, generator, gradients, values
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

from hf_sage.ascents import L2Ascent
from hf_sage.engine import Part, Step, StepReport, apply_hook, two_pass_step
from hf_sage.hooks import GGA, Fish
from hf_sage.methods import Method, fish
from hf_sage.objectives import CORAL, DANN, IRM, MMD, RSC, Fishr, GroupDRO, Objective, VREx

SIZES = {"photo": 6, "sketch": 4, "art": 3}
LATE = Step(number=10_000)  # every penalty has set in


class Network(nn.Module):
    """Features of 5 units, and a linear classifier of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Tanh())
        self.classifier = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Network().double()


def parts(model: nn.Module, data: Batch, micro_batches: int = 1) -> list[Part]:
    found = []
    for rows in torch.arange(len(data.groups)).tensor_split(micro_batches):
        for group in dict.fromkeys(data.groups[i] for i in rows):
            own = [i for i in data.rows(group) if i in set(rows.tolist())]
            x, y, weight = data.x[own], data.y[own], len(own) / len(data.groups)
            found.append(Part(group, weight, lambda x=x, y=y, w=weight: w * cross_entropy(model(x), y), y))
    return found


def by_group(data: Batch) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each group, in the order of the groups' names."""
    return [(data.x[data.rows(name)], data.y[data.rows(name)]) for name in sorted(set(data.groups))]


# ---- The published rules, from losses to the derivative by autograd ----

Rule = Callable[[Network, Batch], Tensor]


def mean_loss(model: Network, data: Batch) -> Tensor:
    return cross_entropy(model(data.x), data.y)


def vrex(model: Network, data: Batch) -> Tensor:
    losses = torch.stack([cross_entropy(model(x), y) for x, y in by_group(data)])
    return mean_loss(model, data) + 7.0 * losses.var(correction=0)


def group_dro(model: Network, data: Batch) -> Tensor:
    losses = torch.stack([cross_entropy(model(x), y) for x, y in by_group(data)])
    q = (0.3 * losses.detach()).exp()
    return (q / q.sum() * losses).sum()


def irm(model: Network, data: Batch) -> Tensor:
    penalties = []
    for x, y in by_group(data):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        logits = model(x)
        halves = [cross_entropy(scale * logits[i::2], y[i::2]) for i in (0, 1)]
        one, two = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
        penalties.append(one * two)
    return mean_loss(model, data) + 7.0 * torch.stack(penalties).mean()


def coral(model: Network, data: Batch) -> Tensor:
    found = [model.body(x) for x, _ in by_group(data)]
    total = sum(
        (a.mean(0) - b.mean(0)).square().mean() + (torch.cov(a.mT) - torch.cov(b.mT)).square().mean()
        for a, b in combinations(found, 2)
    )
    return mean_loss(model, data) + 7.0 * total / 3


def mmd(model: Network, data: Batch) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = (a[:, None] - b[None]).square().sum(-1)
        return sum(torch.exp(-(10.0**p) * squares) for p in range(-3, 4)).mean()

    found = [model.body(x) for x, _ in by_group(data)]
    total = sum(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b) for a, b in combinations(found, 2))
    return mean_loss(model, data) + 7.0 * total / 3


def fishr(model: Network, data: Batch) -> Tensor:
    variances = []
    for x, y in by_group(data):
        rows = []
        for features, label in zip(model.body(x), y, strict=True):
            loss = cross_entropy(model.classifier(features), label)
            found = torch.autograd.grad(loss, list(model.classifier.parameters()), create_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        variances.append(torch.stack(rows).var(0, correction=0))
    stacked = torch.stack(variances)
    return mean_loss(model, data) + 7.0 * (stacked - stacked.mean(0)).square().mean()


def rsc(model: Network, data: Batch) -> Tensor:
    """Row by row, sorted instead of by quantiles: 5 features of which the top third by slope is the top one or two."""
    z, y = model.body(data.x), data.y
    leaf = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.classifier(leaf)[torch.arange(len(y)), y].sum(), leaf)
    mask = torch.ones_like(z)
    for i in range(len(y)):
        mask[i, slope[i] >= slope[i].quantile(2 / 3)] = 0

    def confidence(features: Tensor) -> Tensor:
        return softmax(model.classifier(features), -1)[torch.arange(len(y)), y]

    drop = confidence(leaf).detach() - confidence(leaf * mask).detach()
    mask[drop <= drop.quantile(2 / 3)] = 1
    return cross_entropy(model.classifier(z * mask), y)


CASES: dict[str, tuple[Objective, Rule]] = {
    "vrex": (VREx(7.0), vrex),
    "group_dro": (GroupDRO(0.3), group_dro),
    "irm": (IRM(7.0), irm),
    "coral": (CORAL(7.0), coral),
    "mmd": (MMD(7.0), mmd),
    "fishr": (Fishr(7.0), fishr),
    "rsc": (RSC(), rsc),
}
TOLERANCE = {"atol": 1e-8, "rtol": 1e-8}
"""Law 8. Features are taken in fp64 here, as the network is."""


def gradient_of(model: Network, rule: Rule, data: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(rule(model, data), list(model.parameters())))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_gradient_is_the_published_objectives(name, micro_batches):
    objective, rule = CASES[name]
    model, data = network(), batch(sizes=SIZES)
    two_pass_step(model, parts(model, data, micro_batches), Method(name, objective=objective), step=LATE)
    for found, expected in zip(gradients(model), gradient_of(model, rule, data), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("micro_batches", "most"), [(1, 3), (3, 1)])
def test_micro_batches_are_not_held_at_once(micro_batches, most):
    """Accumulation is there to save memory; a batch that is whole anyway is passed through the network once."""
    model, data = network(), batch(sizes=SIZES)
    alive: list[int] = [0]

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, z: Tensor) -> Tensor:
            alive.append(alive[-1] + 1)
            return z.clone()

        @staticmethod
        def backward(_: Any, gradient: Tensor) -> Tensor:
            alive.append(alive[-1] - 1)
            return gradient

    model.body.register_forward_hook(lambda _, __, z: Graph.apply(z) if z.requires_grad else None)
    two_pass_step(model, parts(model, data, micro_batches), Method("coral", objective=CORAL()))
    assert (max(alive), alive[-1]) == (most, 0)


@pytest.mark.parametrize("name", CASES)
def test_the_perturbed_gradient_is_the_objectives_too(name):
    """ε and the second gradient are those of the objective, not of the mean loss."""
    objective, rule = CASES[name]
    model, data, rho = network(), batch(sizes=SIZES), 0.05
    report = two_pass_step(model, parts(model, data), Method(name, L2Ascent(rho), objective=objective), step=LATE)
    clean = gradient_of(model, rule, data)
    length = torch.cat([g.reshape(-1) for g in clean]).norm()
    moved = network()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), clean, strict=True):
            p.add_(g, alpha=float(rho / length))
    for found, expected in zip(gradients(model), gradient_of(moved, rule, data), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(
        report.perturbation_norm.double(), torch.tensor(rho, dtype=torch.float64), atol=1e-12, rtol=1e-6
    )
    torch.testing.assert_close(report.loss, mean_loss(network(), data), **TOLERANCE)  # what is logged is the plain loss


@pytest.mark.parametrize("name", CASES)
def test_names_and_order_of_the_groups_do_not_matter(name):
    objective, _ = CASES[name]
    data = batch(sizes=SIZES)
    found = []
    for other in (data, data.renamed({"photo": "b", "sketch": "c", "art": "a"})):
        model = network()
        two_pass_step(model, parts(model, other)[::-1], Method(name, objective=objective), step=LATE)
        found.append(gradients(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize(("objective", "early"), [(VREx(7.0, 500), 1.0), (IRM(7.0, 500), 1.0), (Fishr(7.0, 500), 0.0)])
def test_a_penalty_sets_in_after_its_warmup(objective, early):
    def found(objective: Any, number: int) -> list[Tensor]:
        model, data = network(), batch(sizes=SIZES)
        two_pass_step(model, parts(model, data), Method("own", objective=objective), step=Step(number=number))
        return gradients(model)

    assert objective.sets_in == 500
    for a, b in zip(found(objective, 499), found(type(objective)(early, 0), 0), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for a, b in zip(found(objective, 500), found(type(objective)(7.0, 0), 0), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_rsc_mutes_no_row_where_all_tie():
    """Under a classifier of zeros all features and all rows do; muted, they would leave it at zero for ever."""
    model, data = network(), batch(sizes=SIZES)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    two_pass_step(model, parts(model, data), Method("rsc", objective=RSC()), step=LATE)
    for found, expected in zip(gradients(model), gradient_of(model, mean_loss, data), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    assert model.classifier.weight.grad.norm() > 0.01


# ---- What is remembered ----


def test_group_dro_remembers_its_weights():
    memories: dict[str, Any] = {}
    model, data, eta = network(), batch(sizes=SIZES), 0.3
    for _ in range(3):
        two_pass_step(model, parts(model, data), Method("dro", objective=GroupDRO(eta)), memories=memories)
    # The groups come in the order of their first part.
    losses = torch.stack([cross_entropy(model(data.x[data.rows(k)]), data.y[data.rows(k)]) for k in SIZES]).detach()
    q = (3 * eta * losses).exp()
    torch.testing.assert_close(memories["objective"]["q"], q / q.sum(), **TOLERANCE)


def test_fishr_averages_its_variances_over_steps():
    """Of the same batch again and again the average is that batch's variance: it is rightly normalised."""
    memories: dict[str, Any] = {}
    found = []
    for _ in range(2):
        model, data = network(), batch(sizes=SIZES)
        method = Method("fishr", objective=Fishr(7.0))
        two_pass_step(model, parts(model, data), method, step=LATE, memories=memories)
        found.append(gradients(model))
    # Only the share 0.05/(1 − 0.95²) of the second average is the current batch's, and has a derivative.
    plain = gradient_of(network(), mean_loss, batch(sizes=SIZES))
    for first, second, rest in zip(*found, plain, strict=True):
        torch.testing.assert_close(second - rest, (first - rest) * 0.05 / (1 - 0.95**2), **TOLERANCE)


@pytest.mark.parametrize("conditional", [False, True])
def test_dann_reverses_the_discriminators_gradient(conditional):
    """Its first step by hand: the discriminator as it begins is updated once, and the features flee from it."""
    memories: dict[str, Any] = {}
    model, data = network(), batch(sizes=SIZES)
    objective = DANN(2.0, conditional, width=8, discriminator_learning_rate=0.1)
    two_pass_step(model, parts(model, data), Method("dann", objective=objective), memories=memories)
    held = memories["objective"]["player"]
    grouped = by_group(data)
    x, y = torch.cat([x for x, _ in grouped]), torch.cat([y for _, y in grouped])
    group = torch.cat([torch.full_like(own, k) for k, (_, own) in enumerate(grouped)])

    def fooled(model: Network) -> Tensor:
        z = model.body(x)
        if conditional:
            z = z + held["embedding.weight"].double()[y]
        for i in (0, 2, 4):
            z = z @ held[f"layers.{i}.weight"].double().mT + held[f"layers.{i}.bias"].double()
            z = z.relu() if i < 4 else z
        share = 1 / torch.bincount(y)[y] if conditional else torch.ones(len(y))
        return (share / share.sum() * cross_entropy(z, group, reduction="none")).sum()

    expected = torch.autograd.grad(mean_loss(model, data) - 2.0 * fooled(model), list(model.parameters()))
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)  # class shares are taken in fp32


def test_the_discriminator_learns_and_is_remembered(tmp_path):
    model, data = network(), batch(sizes={"photo": 30, "sketch": 30, "art": 30})
    method = Method("dann", objective=DANN(0.0, width=32, discriminator_learning_rate=0.01))
    memories: dict[str, Any] = {}
    for number in range(60):
        two_pass_step(model, parts(model, data), method, step=Step(number=number), memories=memories)
        torch.save(memories, tmp_path / "held.pt")
        memories = torch.load(tmp_path / "held.pt", weights_only=True)
    player = memories["objective"]["player"]
    grouped = by_group(data)
    z = torch.cat([model.body(x) for x, _ in grouped]).detach()
    group = torch.arange(3).repeat_interleave(30)
    for i in (0, 2, 4):
        z = z @ player[f"layers.{i}.weight"].double().mT + player[f"layers.{i}.bias"].double()
        z = z.relu() if i < 4 else z
    assert (z.argmax(1) == group).double().mean() > 0.6  # the groups' images differ in their mean; chance is 1/3


# ---- Hooks ----


def test_fish_is_half_the_way_of_k_updates():
    model, data = network(), batch(sizes=SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    start = values(model)
    report = apply_hook(model, parts(model, data), Fish(0.5), Step(seed=7), optimizer.step)

    other = network()
    inner = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    order = torch.randperm(3, generator=generator(7)).tolist()
    for k in order:
        rows = data.rows(list(SIZES)[k])
        inner.zero_grad()
        cross_entropy(other(data.x[rows]), data.y[rows]).backward()
        inner.step()
    for found, before, after in zip(values(model), start, values(other), strict=True):
        torch.testing.assert_close(found, before + 0.5 * (after - before), **TOLERANCE)
    assert report is not None
    assert set(report.group_losses) == set(SIZES)
    assert all(p.grad is None for p in model.parameters())


def test_fish_leaves_a_group_out_whose_gradient_is_no_number():
    data = batch(sizes=SIZES)

    def updated(broken: bool) -> tuple[list[Tensor], int, StepReport]:
        model = network()
        updates: list[None] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

        def update() -> None:
            optimizer.step()
            updates.append(None)

        own = parts(model, data)
        first = replace(own[0], loss=lambda: math.nan * own[0].loss())
        report = apply_hook(model, [first if broken else own[0], *own[1:]], Fish(), Step(seed=7), update)
        assert report is not None
        return values(model), len(updates), report

    (found, count, report), (_, whole, sound) = updated(True), updated(False)
    assert all(value.isfinite().all() for value in found)
    assert (count, whole) == (len(SIZES) - 1, len(SIZES))
    assert (report.is_finite, sound.is_finite) == (False, True)


def test_gga_accepts_what_makes_the_groups_agree():
    data = batch(sizes=SIZES)

    def smallest(model: nn.Module) -> float:
        found = []
        for x, y in by_group(data):
            g = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
            found.append(torch.cat([t.reshape(-1) for t in g]))
        return min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(found, 2))

    model = network()
    start, before = values(model), smallest(model)
    hook = GGA(noise=0.05, proposals=30, begin=2, end=3)
    assert hook.sets_in == 2
    for number in (1, 3):
        assert apply_hook(model, parts(model, data), hook, Step(number, seed=1), lambda: None) is None
    for found, expected in zip(values(model), start, strict=True):
        assert torch.equal(found, expected)  # outside the search
    apply_hook(model, parts(model, data), hook, Step(2, seed=1), lambda: None)
    after = smallest(model)
    assert after > before
    assert float(mean_loss(model, data)) < float(mean_loss(network(), data)) + 0.1
    again = network()
    apply_hook(again, parts(again, data), hook, Step(2, seed=1), lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(again), strict=True))


# ---- What it costs ----


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_objective_costs_what_the_listing_says(name, micro_batches):
    """One pass; features of several micro-batches are heard in one forward pass more, before they are passed back."""
    method, (model, data) = Method(name, objective=CASES[name][0]), (network(), batch(sizes=SIZES))
    counted = Counter(model)
    two_pass_step(model, parts(model, data, micro_batches), method, step=LATE)
    heard_first = micro_batches > 1 and "features" in method.needs
    assert counted.forwards == (method.forwards + heard_first) * len(data.groups)
    assert counted.backwards == method.backwards * len(data.groups)


def test_hooks_cost_what_the_listing_says():
    method, (model, data) = fish(), (network(), batch(sizes=SIZES))
    counted = Counter(model)
    apply_hook(model, parts(model, data), Fish(), Step(), lambda: None)
    assert (counted.forwards, counted.backwards) == (len(data.groups) * method.forwards,) * 2
    counted = Counter(model)
    apply_hook(model, parts(model, data), GGA(proposals=250), Step(100), lambda: None)
    assert (counted.forwards, counted.backwards) == (251 * len(data.groups),) * 2


# ---- What cannot be ----


def test_features_that_nobody_has_are_an_error_with_the_cure():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    data = batch(sizes=SIZES)
    with pytest.raises(ValueError, match=r"classifier="):
        two_pass_step(model, parts(model, data), Method("coral", objective=CORAL()))


def test_rows_without_labels_are_an_error_with_the_cure():
    model, data = network(), batch(sizes=SIZES)
    unlabelled = [Part(p.group, p.weight, p.loss) for p in parts(model, data)]
    with pytest.raises(ValueError, match=r"'labels'"):
        two_pass_step(model, unlabelled, Method("irm", objective=IRM()))


def test_fishr_wants_a_linear_classifier():
    model, data = network(), batch(sizes=SIZES)
    model.classifier = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="linear"):
        two_pass_step(model, parts(model, data), Method("fishr", objective=Fishr()))


def test_one_row_a_group_stays_finite():
    data = batch(sizes=dict.fromkeys(SIZES, 1))
    for name, (objective, _) in CASES.items():
        model = network()
        two_pass_step(model, parts(model, data), Method(name, objective=objective), step=LATE)
        assert all(g.isfinite().all() for g in gradients(model)), name
