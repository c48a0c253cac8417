"""Group gradients inside one backward pass: the same math as one pass a group (law 6), or one pass a group."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from assertions import assert_close, assert_same_bits
from problems import SIZES, Batch, batch, gradients, network, network_with, parts_of, values, watched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hf_sage.engine import Joint, Part, StepReport, Verdict, clean_pass, joint_clean_pass, two_pass_step
from hf_sage.engine.joint import collector
from hf_sage.methods import erm, sage, sam

EXACT = 1e-10
"""fp64, the same sums in another order."""
SAGE = sage(0.05, 0.3, polar="svd")


def joint_of(model: nn.Module, data: Batch, verdict: Verdict | None = None) -> Joint:
    groups = list(dict.fromkeys(data.groups))
    order = [i for group in groups for i in data.rows(group)]
    rows = [(group, len(data.rows(group))) for group in groups]
    return Joint(rows, lambda: cross_entropy(model(data.x[order]), data.y[order]), verdict or Verdict())


def found(model: nn.Module, parts: list[Part], joint: Joint) -> None:
    """Compares the joint pass with one pass a group."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = torch.get_rng_state()
    expected = clean_pass(parameters, parts, Tensor.backward)
    torch.set_rng_state(state)
    actual = joint_clean_pass(model, parameters, parts, joint, Tensor.backward)
    assert joint.verdict.obstacle is None
    assert actual is not None
    assert [g is None for g in actual.gradient] == [g is None for g in expected.gradient]
    size = torch.stack([g.norm() for g in expected.gradient if g is not None]).norm()
    for i, (g, h) in enumerate(zip(actual.gradient, expected.gradient, strict=True)):
        assert g is None or (g - h).norm() <= EXACT * max(h.norm(), 1e-3 * size), f"gradient {i}"
        assert g is None or g.dtype == h.dtype
    assert_close([actual.agreement, actual.loss], [expected.agreement, expected.loss], EXACT)
    assert list(actual.group_losses) == list(expected.group_losses)
    for group, (loss, weight) in expected.group_losses.items():
        assert_close([actual.group_losses[group][0]], [loss], EXACT)
        assert actual.group_losses[group][1] == pytest.approx(weight, rel=EXACT)
    assert all(p.grad is None for p in model.parameters())


# ---- Law 6: the same math ----


class Table(nn.Module):
    """Looks its input up, and uses the table again for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(3, 4, padding_idx=1), nn.Embedding(9, 4)
        self.register_buffer("positions", torch.arange(9).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x.flatten(1).round().long().clamp(0, 2)) + self.position(self.positions)
        return F.linear(h.tanh().mean(1), self.table.weight)


class Attention(nn.Module):
    """Parameters of its own that meet rows in sums, products, and in front of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(1, 4, 3))
        self.scale, self.shift, self.out = (nn.Parameter(torch.randn(*s)) for s in ((3,), (4, 3), (3, 3)))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x.flatten(2).squeeze(1).view(-1, 3, 3) * 1.0 + 0 * self.scale.detach())
        h = F.linear(h, self.out.t())
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.place
        h = h + F.scaled_dot_product_attention(h, h, h)
        h += self.shift
        return (self.scale * h)[:, 0] @ self.out * self.temperature.exp() / self.temperature


class Addmm(nn.Module):
    """As GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(), nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def with_frozen_base() -> nn.Module:
    model = network_with(nn.Linear(8, 8))
    model[1].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def with_unused() -> nn.Module:
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution as a product": network,
    "overlapping convolution": lambda: images(nn.Conv2d(1, 4, 2, padding=1, stride=2), nn.Conv2d(4, 4, 2, groups=2)),
    "patches": lambda: images(nn.Conv2d(1, 4, (2, 1), stride=(2, 1))),
    "layer norm": lambda: network_with(nn.LayerNorm(8)),
    "layer norm without bias": lambda: network_with(nn.LayerNorm(8, bias=False)),
    "rms norm": lambda: network_with(nn.RMSNorm(8)),
    "group norm": lambda: network_with(nn.GroupNorm(2, 8)),
    "dropout": lambda: network_with(nn.Dropout(0.5)),
    "batch norm at rest": lambda: network_with(nn.BatchNorm1d(8, affine=False)).eval(),
    "weight norm": lambda: network_with(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
    "tied table": Table,
    "raw parameters": Attention,
    "addmm": lambda: network_with(Addmm()),
    "frozen base": with_frozen_base,
    "unused parameter": with_unused,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [SIZES, {"a": 3, "b": 3, "c": 3}], ids=["unequal groups", "equal groups"])
def test_a_joint_pass_finds_what_one_pass_a_group_finds(name, sizes):
    torch.manual_seed(0)
    model, data = MODELS[name]().double(), batch(sizes=sizes)
    with torch.no_grad():
        model(data.x)  # lazy layers
    found(model, parts_of(model, data), joint_of(model, data))


@pytest.mark.parametrize("name", ["convolution as a product", "overlapping convolution", "tied table", "addmm"])
def test_chunks_change_nothing(name, monkeypatch):
    monkeypatch.setitem(collector.CHUNK, "cpu", 8)
    monkeypatch.setattr(collector, "SMALL", 0)
    test_a_joint_pass_finds_what_one_pass_a_group_finds(name, SIZES)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing": lambda x, y: cross_entropy(x, y, label_smoothing=0.1),
    "class weights": lambda x, y: cross_entropy(x, y, weight=WEIGHTS, label_smoothing=0.1),
    "ignored labels": lambda x, y: cross_entropy(x, y.masked_fill(y == 2, -100)),
    "probabilities": lambda x, y: cross_entropy(x, F.one_hot(y, 3).double() * 0.9 + 0.1),
    "likelihood": lambda x, y: F.nll_loss(x.log_softmax(1), y),
    "squares": lambda x, y: F.mse_loss(x, F.one_hot(y, 3).double()),
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).double()),
    "a sum, divided": lambda x, y: cross_entropy(x, y, reduction="sum") / 7,
    "two": lambda x, y: (cross_entropy(x, y) + 3 * F.mse_loss(x[:, :1], y.double().unsqueeze(1))) / 2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_groups(name):
    model, data, loss = network(), batch(), LOSSES[name]
    # The mean of all rows is the weighted mean of the groups' if each weight is the group's share of what is counted.
    counts = {g: _counted(name, data.y[data.rows(g)]) for g in SIZES}
    total = sum(counts.values())
    factors = {g: 1.0 if "sum" in name else n / total for g, n in counts.items()}
    parts = [share(model, data, loss, g, n / total, factors[g]) for g, n in counts.items()]
    found(model, parts, replace(joint_of(model, data), loss=lambda: loss(model(data.x), data.y)))


def share(model: nn.Module, data: Batch, loss: Callable[..., Tensor], group: str, weight: float, factor: float) -> Part:
    rows = data.rows(group)
    return Part(group, weight, lambda: factor * loss(model(data.x[rows]), data.y[rows]))


def _counted(name: str, y: Tensor) -> float:
    if name == "class weights":
        return WEIGHTS[y].sum().item()
    return (y != 2).sum().item() if name == "ignored labels" else len(y)


def test_parameters_in_half_precision():
    model, data = network(torch.bfloat16), batch(torch.bfloat16)
    verdict = Verdict()
    parameters, parts = list(model.parameters()), parts_of(model, data)
    actual = joint_clean_pass(model, parameters, parts, joint_of(model, data, verdict), Tensor.backward)
    expected = clean_pass(parameters, parts, Tensor.backward)
    assert actual is not None, verdict
    assert_close(actual.gradient, expected.gradient, 0.02)  # bf16 has 8 bits


# ---- The step ----


def step(model: nn.Module, data: Batch, method=SAGE, verdict: Verdict | None = None, **options) -> StepReport:
    joint = joint_of(model, data, verdict)
    return two_pass_step(model, parts_of(model, data), method, joint=joint, **options)


@pytest.mark.parametrize("method", [SAGE, sam(0.05), erm()], ids=["sage", "sam", "erm"])
def test_a_step_is_the_same_either_way(method):
    model, other, data = network(), network(), batch()
    before = values(model)
    expected, report = two_pass_step(model, parts_of(model, data), method), step(other, data, method)
    assert_close(gradients(other), gradients(model), EXACT)
    for name in ("loss", "perturbed_loss", "agreement", "perturbation_norm"):
        a, b = getattr(report, name), getattr(expected, name)
        assert (a is b is None) or a.item() == pytest.approx(b.item(), rel=EXACT)
    assert_same_bits(values(other), before, "parameter")


def test_two_passes_in_all():
    model, data, verdict = network(), batch(), Verdict()
    step(model, data, verdict=verdict)
    with watched(model) as seen:
        step(model, data, verdict=verdict)
    assert len(seen) == 2
    assert len(verdict.proven) == 1


def test_the_second_pass_may_draw_the_first_one_s_numbers():
    data, verdict = batch(), Verdict()
    model = network_with(nn.Dropout(0.5))
    report = step(model, data, sam(1e-9), verdict, same_dropout=True)
    assert report.perturbed_loss.item() == pytest.approx(report.loss.item(), rel=1e-6)
    report = step(model, data, sam(1e-9), verdict)
    assert report.perturbed_loss.item() != pytest.approx(report.loss.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**16, 1 / 3])
def test_a_scaled_loss_scales_the_gradient_alone(scale):
    model, scaled, data = network(), network(), batch()
    report, other = step(model, data, erm()), step(scaled, data, erm(), backward=lambda loss: (loss * scale).backward())
    assert_close(gradients(scaled), [scale * g for g in gradients(model)], EXACT)
    assert_close([other.loss, other.agreement], [report.loss, report.agreement], EXACT)


# ---- Where it does not apply ----


class Mixing(nn.Module):
    """Rows that see the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.3 * x.mean(0, keepdim=True)


class OfItsOwn(nn.Module):
    """A parameter in a function that torch does not show."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.save_for_backward(x, p)
            return x * p

        @staticmethod
        def backward(ctx, g):
            x, p = ctx.saved_tensors
            return g * p, (g * x).sum(0)

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.Times.apply(x, self.p)


class SecondOrder(nn.Module):
    """A gradient inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.tanh())
        return torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0]


class TimeFirst(nn.Module):
    """Places before rows: as many first dimensions, of another meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(len(x), 4, 2).transpose(0, 1).reshape(-1, 2)
        return self.inner(h).view(4, len(x), 2).transpose(0, 1).flatten(1)


class Reentrant(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 4, 2)
        return self.inner(x, x, x)[0].flatten(1)


class Irregular(nn.Module):
    """Another parameter whenever chance has it, and a count of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inner[int(self.training and torch.rand([]).item() < 0.5)](x)


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(8), "batch_norm"),
    "batch norm without parameters": (lambda: nn.BatchNorm1d(8, affine=False), "batch normalisation"),
    "mixing": (Mixing, "loss of group"),
    "function of its own": (OfItsOwn, "does not show"),
    "second order": (SecondOrder, "differentiated"),
    "time first": (TimeFirst, "gradient of parameter"),
    "checkpoint": (Checkpointed, "CheckpointError"),
    "reentrant checkpoint": (Reentrant, "does not show"),
    "multi-head attention": (SelfAttention, "multi_head_attention"),
    "compiled": (lambda: torch.compile(nn.Linear(8, 8), backend="eager"), "compile"),
    "traced": (lambda: torch.jit.trace(nn.Linear(8, 8).double(), torch.ones(1, 8).double()), ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBSTACLES)
def test_elsewhere_one_pass_a_group_as_if_nothing_had_been_tried(name):
    layer, obstacle = OBSTACLES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = layer()
    model, data, verdict = network_with(nn.Sequential(nn.Dropout(0.5), middle)), batch(), Verdict()
    start = [b.clone() for b in model.buffers()]
    expected_state, state = _steps(model, data, None)
    for buffer, value in zip(model.buffers(), start, strict=True):
        buffer.data.copy_(value)
    found_state, found_rng = _steps(model, data, verdict)
    assert_same_bits(found_state, expected_state)
    assert torch.equal(found_rng, state)
    assert obstacle in verdict.obstacle
    assert not verdict.proven
    with watched(model) as seen:
        step(model, data, verdict=verdict)
    assert len(seen) == 2 * len(SIZES)  # remembered
    assert all(m.training for m in model.modules() if isinstance(m, nn.Dropout))


def _steps(model: nn.Module, data: Batch, verdict: Verdict | None) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    for _ in range(2):
        joint = joint_of(model, data, verdict) if verdict is not None else None
        report = two_pass_step(model, parts_of(model, data), SAGE, joint=joint)
    buffers = [b.clone() for b in model.buffers()]
    return [*gradients(model), *buffers, report.loss, report.agreement], torch.get_rng_state()


def test_what_is_left_to_chance_is_not_taken_for_proven():
    model, data, verdict = network_with(Irregular()), batch(), Verdict()
    while verdict.obstacle is None:  # the first passes may happen to use the parameters that the trial used
        model.zero_grad()
        start, runs = torch.get_rng_state(), model[2].runs.clone()
        step(model, data, verdict=verdict)
    found = [torch.get_rng_state(), model[2].runs - runs, *gradients(model)]
    assert "otherwise in some steps" in verdict.obstacle
    model.zero_grad()
    torch.set_rng_state(start)
    runs.copy_(model[2].runs)
    two_pass_step(model, parts_of(model, data), SAGE)
    assert_same_bits(found, [torch.get_rng_state(), model[2].runs - runs, *gradients(model)])


@pytest.mark.parametrize(
    ("loss", "obstacle"),
    [
        (lambda x, y: -x.log_softmax(1)[torch.arange(len(y)), y].mean(), "mean or a sum"),
        (lambda x, y: cross_entropy(x, y, reduction="none").mean(), "mean or a sum"),
        (lambda x, y: cross_entropy(x, y) + 0.01 * x.pow(2).mean(), "mean or a sum"),
        (lambda x, y: cross_entropy(x, y) + 0.01 * x.std(0).mean().detach(), "mean or a sum"),
        (lambda x, y: cross_entropy(x, y).exp(), "mean or a sum"),
        (lambda x, _: cross_entropy(x @ x.T, torch.arange(len(x))), "loss of group"),
    ],
    ids=["of its own", "unreduced", "another term", "a constant term", "not linear", "contrastive"],
)
def test_a_loss_that_cannot_be_told_apart(loss, obstacle):
    model, data, verdict = network(), batch(), Verdict()
    parts = [share(model, data, loss, g, n / 10, n / 10) for g, n in SIZES.items()]
    joint = replace(joint_of(model, data, verdict), loss=lambda: loss(model(data.x), data.y))
    assert joint_clean_pass(model, list(model.parameters()), parts, joint, Tensor.backward) is None
    assert obstacle in verdict.obstacle


def test_autocast_and_hooks_on_gradients_keep_to_one_pass_a_group():
    model, data, verdict = network(torch.float32), batch(torch.float32), Verdict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, data, verdict=verdict)
    assert "autocast" in verdict.obstacle
    model, seen, verdict = network(), [], Verdict()
    model[0].weight.register_hook(lambda g: seen.append(g))
    step(model, batch(), verdict=verdict)
    assert "hooks" in verdict.obstacle
    assert seen


def test_a_loss_that_is_not_finite_decides_nothing():
    model, data, verdict = network(), batch(), Verdict()
    broken = replace(data, x=data.x * float("inf"))
    assert not step(model, broken, verdict=verdict).is_finite
    assert (verdict.obstacle, verdict.proven) == (None, set())
    step(model, data, verdict=verdict)
    assert verdict.proven
    report = step(model, broken, verdict=verdict)
    assert not report.is_finite
    assert verdict.obstacle is None


@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupt_leaves_everything_as_it_was(at):
    model, data, verdict = network_with(nn.Dropout(0.5)), batch(), Verdict()
    before, calls = values(model), [0]
    kept = torch.randn_like(next(model.parameters()))
    next(model.parameters()).grad = kept

    def interrupt(*_: object) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, data, verdict=verdict)
    handle.remove()
    assert_same_bits(values(model), before, "parameter")
    assert next(model.parameters()).grad is kept
    assert all(m.training for m in model.modules())
    assert verdict.obstacle is None
    step(model, data, verdict=verdict)
    assert verdict.proven


# ---- Memory ----


def test_memory_does_not_grow_with_the_number_of_groups(monkeypatch):
    monkeypatch.setitem(collector.CHUNK, "cpu", 2**13)
    monkeypatch.setattr(collector, "SMALL", 2**10)
    wide = 256

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, wide), nn.Linear(wide, wide), nn.Linear(wide, 3))

    def peak(k: int, joint: bool) -> int:
        net, data = model(), batch(torch.float32, {str(i): 12 // k for i in range(k)})
        parameters, parts, verdict = list(net.parameters()), parts_of(net, data), Verdict()
        one = joint_of(net, data, verdict)

        def passes() -> None:
            if joint:
                assert joint_clean_pass(net, parameters, parts, one, Tensor.backward) is not None
            else:
                clean_pass(parameters, parts, Tensor.backward)

        passes()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            passes()
        gc.collect()
        held = high = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                high = max(high, held)
        return high

    whole = 4 * sum(p.numel() for p in model().parameters())
    one_pass_a_group = [peak(k, joint=False) for k in (3, 6)]
    joint = [peak(k, joint=True) for k in (3, 6)]
    assert one_pass_a_group[1] - one_pass_a_group[0] > 2 * whole
    assert abs(joint[1] - joint[0]) < 0.1 * whole
    assert max(joint) < 3 * whole
