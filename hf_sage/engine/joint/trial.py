"""Whether the groups of a batch can share one pass: found out by trial, and remembered.

Which parameters meet which rows is told from functions and shapes, and may be told wrongly; and a network may let rows
of different groups influence one another, so that a group's gradient is not what its rows contribute. Neither is taken
on trust: before a pass is used for the first time it is compared with one pass a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import is_distributed
from hf_sage.engine.gradients import Backward, Part, gradient_of
from hf_sage.engine.joint.collector import Collector, GroupRows
from hf_sage.engine.joint.mode import JointMode
from hf_sage.engine.randomness import RandomState

Signature = tuple[Any, ...]

SMALL = 1e-2
"""A parameter's gradient is compared in units of its norm, and of this share of the whole norm at the least: where it
is zero but for round-off, as that of an attention's key bias is, there is nothing to compare."""


@dataclass
class Verdict:
    """What is known about a network and its loss; to be kept from step to step.

    Attributes:
        obstacle: Why the groups cannot share a pass; ``None`` as long as they can.
        proven: The signatures of passes that agreed with one pass a group, see `JointMode`.
    """

    obstacle: str | None = None
    proven: set[Signature] = field(default_factory=set)


@dataclass(frozen=True)
class Joint:
    """A batch as one.

    Attributes:
        rows: The groups in the order of their rows, and the number of rows of each.
        loss: Computes the loss of the whole batch, what the losses of all its parts sum to. It is called once in each
            pass and must not change its inputs.
        verdict: What earlier steps found out.
    """

    rows: Sequence[tuple[Hashable, int]]
    loss: Callable[[], Tensor]
    verdict: Verdict = field(default_factory=Verdict)


@dataclass
class JointPass:
    """What one forward and backward pass over all groups found.

    Attributes:
        collector: The gradients.
        loss: The loss of the batch.
        shares: Each group's share of it.
        signature: See `JointMode`.
        obstacle: Why this is not to be used, if so.
        random_states: The state of the random generators it started from.
    """

    collector: Collector
    loss: Tensor
    shares: Tensor | None
    signature: Signature
    obstacle: str | None
    random_states: list[RandomState]

    @property
    def is_finite(self) -> bool:
        """Whether it can be compared with anything."""
        return bool(torch.isfinite(self.loss)) and bool(torch.isfinite(self.collector.gram).all())


def run(
    parameters: Sequence[Tensor],
    joint: Joint,
    backward: Backward,
    probe: Callable[[int, Tensor], Tensor] | None = None,
) -> JointPass:
    """One forward and backward pass; the parameters' ``.grad`` is left as it was."""
    names, sizes = zip(*joint.rows, strict=True)
    collector = Collector(parameters, GroupRows(names, sizes), probe)
    states: list[RandomState] = []
    mode = JointMode(collector)

    def forward_pass() -> Tensor:
        with mode:
            loss = joint.loss()
        mode.losses.take_apart(loss)
        return loss

    def backward_pass(loss: Tensor) -> None:
        if collector.obstacle is None:
            backward(loss)

    passed_by, loss = gradient_of(parameters, [Part(None, 1.0, forward_pass)], backward_pass, record=states)
    collector.finish()
    shares = mode.losses.shares()
    obstacle = collector.obstacle
    if obstacle is None and any(g is not None for g in passed_by):
        obstacle = "parameters in functions that torch does not show"
    if obstacle is None and shares is None:
        obstacle = "a loss that is not known to be a mean or a sum over rows"
    return JointPass(collector, loss, shares, tuple(mode.signature), obstacle, states)


def obstacle_at_sight(model: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    """What rules out a joint pass before it is tried."""
    if is_distributed() or any(isinstance(p, DTensor) for p in parameters):
        return "several ranks"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        return "hooks on the gradient of a parameter"
    if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()):
        return "torch.compile"
    return None


def tried(
    model: nn.Module,
    parameters: Sequence[Tensor],
    parts: Sequence[Part],
    joint: Joint,
    backward: Backward,
    unnoticed: Callable[[], AbstractContextManager[None]],
) -> None:
    """Compares a joint pass with one pass a group and writes down the verdict; leaves all else as it was.

    Where the network draws random numbers, the groups would get others in passes of their own: then both are run as in
    evaluation. Nothing is decided by a batch whose loss or gradient is not finite.
    """
    joint.verdict.obstacle = obstacle_at_sight(model, parameters)
    if joint.verdict.obstacle is not None:
        return
    state = RandomState.capture()
    try:
        with frozen_running_statistics(model), unnoticed():
            found = run(parameters, joint, backward, _probe)
            drawn = not state.is_present()
            state.restore()
            with _evaluating(model, drawn):
                if drawn and found.obstacle is None:
                    found = run(parameters, joint, backward, _probe)
                    state.restore()
                if found.obstacle is None and found.is_finite:
                    found.obstacle = _disagreement(parameters, parts, found, backward)
                    if found.obstacle is None:
                        joint.verdict.proven.add(found.signature)
        joint.verdict.obstacle = found.obstacle
    except Exception as error:  # of whatever kind: one pass a group will meet it again if it is not of our making
        joint.verdict.obstacle = f"{type(error).__name__}: {error}"
    finally:
        state.restore()


def _disagreement(
    parameters: Sequence[Tensor], parts: Sequence[Part], found: JointPass, backward: Backward
) -> str | None:
    """In what the passes over single groups differ from the joint one; only one group's gradient is held at a time."""
    assert found.shares is not None
    collector = found.collector
    for k, group in enumerate(collector.rows.names):
        gradient, loss = gradient_of(parameters, [part for part in parts if part.group == group], backward)
        tolerance = max(_tolerance(t) for t in (*parameters, loss))
        if (found.shares[k] - loss).abs() > tolerance * loss.abs():
            return f"the loss of group {group!r}"
        norms = [0.0 if g is None else float(torch.linalg.vector_norm(g.double())) for g in gradient]
        floor = SMALL * math.hypot(*norms)
        for i, (p, g, norm) in enumerate(zip(parameters, gradient, norms, strict=True)):
            expected = 0.0 if g is None else float((g.double() * _probe(i, p)).sum())
            own = float(collector.sketch[i][k]) if i in collector.sketch else 0.0
            # The difference of two vectors times a probe is as large as the difference, more or less.
            if abs(own - expected) > tolerance * max(norm, floor):
                return f"the gradient of parameter {i}, of shape {tuple(p.shape)}, in group {group!r}"
    return None


def _probe(index: int, p: Tensor) -> Tensor:
    """A pseudo-random vector for each parameter, the same at every call."""
    generator = torch.Generator(p.device).manual_seed(index)
    return torch.randn(p.shape, dtype=torch.float64, device=p.device, generator=generator)


def _tolerance(t: Tensor) -> float:
    """Half the digits of the arithmetic, of which TF32 has 10 bits.

    That of fp32 at the most: some of a network is computed in fp32 whatever the rest is kept in.
    """
    digits = 2.0**-10 if t.is_cuda else torch.finfo(torch.float32).eps
    return math.sqrt(max(torch.finfo(t.dtype).eps, digits))


@contextmanager
def _evaluating(model: nn.Module, wanted: bool) -> Iterator[None]:
    """A block in which the model is in evaluation mode, if wanted."""
    modes = [(m, m.training) for m in model.modules()] if wanted else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
