"""The gradient of an objective of the features before the classifier, exact however the batch is cut.

The features of all rows, of every micro-batch and of every rank that shares the gradient, are gathered first; the
objective is taken of them as a whole; and its derivative by each row's features is carried back through the network
with that row's part of the batch. Where a rank has one part of each group, one micro-batch, the graphs of the first
pass serve; elsewhere they would need the memory of all micro-batches at once, so each part is passed through the
network again, with the same random numbers, which costs one forward pass more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import Gradients, Reduction
from hf_sage.engine.gradients import Backward, CleanPass, Part, gradient_of
from hf_sage.engine.randomness import RandomState
from hf_sage.objectives import FeatureObjective, Rows
from hf_sage.rules import Step

HEADS = ("classifier", "head", "score", "fc")
"""What networks call the module that turns features into logits."""


class FeatureTap:
    """Listens at the classifier's input.

    Args:
        model: The network.
        name: The classifier's name in it; by default the first of `HEADS` that it has.

    Raises:
        ValueError: If the network has no such module.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        modules = dict(model.named_modules())
        found = next((n for n in ((name,) if name is not None else HEADS) if n in modules), None)
        if found is None:
            raise ValueError(
                f"The model has no module {' or '.join(map(repr, (name,) if name else HEADS))} whose input would "
                "be its features. Name its classifier, the module from features to logits, by classifier=... ; its "
                f"modules are: {', '.join(n for n, _ in model.named_children())}."
            )
        self.head = modules[found]
        self.heard: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which the classifier's inputs are heard."""
        self.heard.clear()
        handle = self.head.register_forward_pre_hook(lambda _, inputs: self.heard.append(inputs[0].flatten(1)))
        try:
            yield
        finally:
            handle.remove()

    def take(self, rows: int) -> Tensor:
        """The features of the part that was just passed through the network.

        Raises:
            ValueError: If the classifier did not see one row an example.
        """
        heard, self.heard[:] = list(self.heard), []
        if len(heard) != 1 or heard[0].shape[0] != rows:
            shapes = ", ".join(str(tuple(z.shape)) for z in heard) or "nothing"
            raise ValueError(
                f"The classifier should see the features of {rows} rows once; it saw {shapes}. This objective works "
                "for classifiers of one label a row; name the right module by classifier=... ."
            )
        return heard[0]


def feature_pass(
    model: nn.Module,
    parameters: Sequence[Tensor],
    parts: Sequence[Part],
    backward: Backward,
    objective: FeatureObjective,
    tap: FeatureTap,
    step: Step,
    *,
    reduce: Reduction,
    record_randomness: bool = False,
    replay: Sequence[RandomState] | None = None,
) -> CleanPass:
    """The gradient of the objective at the weights as they are, and the losses of the groups.

    Args:
        model: The network.
        parameters: The trainable parameters.
        parts: The batch, group by group; each tells its labels.
        backward: See `gradient_of`.
        objective: The objective.
        tap: Where the features are heard.
        step: The step, with the objective's memory.
        reduce: Averages the gradient over ranks, and gathers the features of those that it averages over: a rank whose
            gradient is its own takes the objective of its own rows.
        record_randomness: See `clean_pass`.
        replay: See `gradient_of`.

    Returns:
        A `CleanPass` with the objective's gradient, reduced; its losses are the plain ones, its agreement is NaN: the
        groups have no gradients of their own.

    Raises:
        ValueError: If a part has no labels, or the classifier does not see one row an example.
    """
    missing = [part.group for part in parts if part.labels is None]
    if missing:
        raise ValueError(
            f"{type(objective).__name__} needs one integer label a row, and the batch has none for {missing[0]!r}. "
            "Name them 'labels', class indices of shape (rows,)."
        )
    at_once = len({part.group for part in parts}) == len(parts)  # then the first pass's graphs serve the second
    states = list(replay) if replay is not None else []
    recorded: list[RandomState] = []  # before each part
    live: list[tuple[Tensor, Tensor]] = []
    dtype = next((p.dtype for p in tap.head.parameters()), torch.float32)  # features may come out of an autocast
    features: list[Tensor] = []
    values: list[Tensor] = []
    with tap.listening(), torch.set_grad_enabled(at_once):
        for i, part in enumerate(parts):
            if states:
                states[i].restore()
            recorded.append(RandomState.capture())
            loss = part.loss()
            z = tap.take(_rows(part))
            values.append(loss.detach())
            features.append(z.detach().to(dtype))
            if at_once:
                live.append((loss, z))

    groups, leaves, ranks = _everyones(parts, features, reduce)
    with torch.enable_grad():
        value = objective(groups, tap.head, step)
        own_leaves = [leaves[i] for i in range(len(parts))]
        head = [p for p in tap.head.parameters() if p.requires_grad]
        found = torch.autograd.grad(value, [*own_leaves, *head], allow_unused=True)
    by_feature, by_head = found[: len(parts)], dict(zip(map(id, head), found[len(parts) :], strict=True))

    def carried(i: int, loss: Tensor, z: Tensor) -> Tensor:
        """The part's loss, and its rows' share of the objective: linear in their features, with its derivative."""
        own = loss * 0 if objective.replaces_loss else loss
        derivative = by_feature[i]
        if derivative is not None:
            # The gradient is averaged over ranks; each row is on one of them only.
            own = own + ranks * (z.to(dtype) * derivative.to(z.device)).sum()
        return own

    def passed_again(i: int, part: Part) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            if at_once:
                return carried(i, *live[i])
            with tap.listening():
                value = part.loss()
                return carried(i, value, tap.take(_rows(part)))

        return loss

    again = [Part(part.group, part.weight, passed_again(i, part)) for i, part in enumerate(parts)]
    after = RandomState.capture()
    with nullcontext() if at_once else frozen_running_statistics(model):  # the first pass has moved them
        gradient, _ = gradient_of(parameters, again, backward, replay=None if at_once else recorded)
    after.restore()
    _add_direct(parameters, gradient, by_head, step.gradient_scale)
    losses = _losses(parts, values)
    total = torch.stack(values).sum() if values else torch.zeros((), device=parameters[0].device)
    kept = recorded if record_randomness else []
    unknown = torch.full((), math.nan, dtype=torch.float64, device=total.device)
    return CleanPass(total, reduce(gradient, parameters), unknown, losses, list(parts), kept)


def _rows(part: Part) -> int:
    assert part.labels is not None
    return len(part.labels)


def _everyones(
    parts: Sequence[Part], features: Sequence[Tensor], reduce: Reduction
) -> tuple[dict[str, Rows], list[Tensor], int]:
    """The rows of each group over the ranks that share a gradient, this rank's own leaves, and the number of ranks.

    The groups are in the order of their names, and their rows in that of the micro-batches, as one process has them.
    """
    leaves = [z.requires_grad_() for z in features]
    sent = [
        (str(p.group), z.detach().cpu(), p.labels.cpu())
        for p, z in zip(parts, leaves, strict=True)
        if p.labels is not None
    ]
    everyones, rank = reduce.everyones(sent)
    device = leaves[0].device if leaves else torch.device("cpu")
    names = sorted({name for own in everyones for name, _, _ in own})
    groups = {}
    for name in names:
        found: list[tuple[int, int, Tensor, Tensor]] = []
        for r, own in enumerate(everyones):
            of_group = [(i, z, y) for i, (group, z, y) in enumerate(own) if group == name]
            for turn, (i, z, y) in enumerate(of_group):
                found.append((turn, r, leaves[i] if r == rank else z.to(device), y.to(device)))
        found.sort(key=lambda piece: piece[:2])
        groups[name] = Rows(torch.cat([z for *_, z, _ in found]), torch.cat([y for *_, y in found]))
    return groups, leaves, len(everyones)


def _add_direct(
    parameters: Sequence[Tensor], gradient: Gradients, direct: Mapping[int, Tensor | None], scale: float
) -> None:
    """Adds the objective's derivative by the classifier's own weights, told by id; every rank has found it alike."""
    for i, p in enumerate(parameters):
        found = direct.get(id(p))
        if found is not None:
            held = gradient[i]
            gradient[i] = found * scale if held is None else held.add_(found, alpha=scale)


def _losses(parts: Sequence[Part], values: Sequence[Tensor]) -> dict[Hashable, tuple[Tensor, float]]:
    losses: dict[Hashable, tuple[Tensor, float]] = {}
    for part, value in zip(parts, values, strict=True):
        before, weight = losses.get(part.group, (torch.zeros_like(value), 0.0))
        losses[part.group] = (before + value, weight + part.weight)
    return losses
