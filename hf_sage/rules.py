"""What the rules of a method share: what they may ask of a step, and what they remember from one step to the next.

A rule is an immutable object with its hyperparameters; what changes from step to step is in the `Step` it is called
with. So a rule can be shared, compared, pickled and printed, and a training goes on from a checkpoint by putting the
memories back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

Need = Literal["groups", "features", "auxiliary", "curvature", "memory"]
"""What a rule cannot do without: the gradient or loss of each group, the features before the classifier, an auxiliary
batch, Hessian-vector products, a memory of earlier steps."""

Memory = dict[str, Any]
"""What one rule remembers: tensors, numbers, strings, and lists and dictionaries of these, so that it can be saved."""


class Passes(Protocol):
    """Further evaluations of a step's batch. They leave parameters, buffers and ``.grad`` as they were."""

    def gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """The gradient of the batch's loss at θ + ε, at θ for ``None``: one forward and one backward pass."""

    def auxiliary_gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """The same of the auxiliary batch."""

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v, H being the Hessian of the batch's loss at θ, layers in evaluation mode: a forward, two backward passes.

        It knows no loss scale.
        """


class NoPasses:
    """Stands where a step has no further passes to offer."""

    def gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """Raises."""
        raise self._error()

    def auxiliary_gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """Raises."""
        raise self._error()

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Raises."""
        raise self._error()

    @staticmethod
    def _error() -> ValueError:
        return ValueError("This rule takes further passes; call it from hf_sage.engine.two_pass_step, which has them.")


@dataclass
class Step:
    """The step that a rule is called in.

    Attributes:
        number: Updates made before this one.
        seed: Seed of this step's random numbers: a function of the run's seed and the step alone, the same on all
            ranks, so that replicas stay equal and a resumed run draws what the uninterrupted one would have drawn.
        learning_rate: Of the base optimizer, in this step.
        gradient_scale: What every gradient is multiplied by: the loss scale of a GradScaler, 1 without one.
        passes: Further evaluations of the batch.
        memory: What this rule remembers; it writes there what it wants to find in the next step, new values in the
            place of old ones: a value that is there is never changed in place.
        facts: What rules have to say for the log, 0-dimensional tensors by name; all rules of a step share it.
    """

    number: int = 0
    seed: int = 0
    learning_rate: float = 0.0
    gradient_scale: float = 1.0
    passes: Passes = field(default_factory=NoPasses)
    memory: Memory = field(default_factory=dict)
    facts: dict[str, Tensor] = field(default_factory=dict)


class Rule:
    """What every part of a method is.

    Attributes:
        needs: What the rule cannot do without.
        delayed_by: The hyperparameter that counts the updates before the rule sets in; ``None``: there are none.
        passes: Forward and backward passes over the batch that it adds to those of the step, on average over the steps
            in which it is called.
        auxiliary_passes: The same over the auxiliary batch.
        hessian_products: Products with the Hessian that it takes, on average over all steps.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    delayed_by: ClassVar[str | None] = None

    @property
    def sets_in(self) -> int:
        """The number of the first update, counted from 0, in which the rule does all that it is there for."""
        return 0 if self.delayed_by is None else int(getattr(self, self.delayed_by))

    @property
    def passes(self) -> float:
        """Further forward and backward passes over the batch, on average over the steps in which it is called."""
        return 0.0

    @property
    def auxiliary_passes(self) -> float:
        """Forward and backward passes over the auxiliary batch, on average over the steps in which it is called."""
        return 0.0

    @property
    def hessian_products(self) -> float:
        """Products of the batch's Hessian with a vector, on average a step: a forward, two backward passes each."""
        return 0.0


def remembered(memory: Memory, name: str, like: Sequence[Tensor]) -> list[Tensor] | None:
    """A list of tensors that was written under a name, or ``None`` if there is none that fits ``like``.

    It does not fit where parameters have joined in or left since: then the rule starts anew.
    """
    held: list[Tensor] | None = memory.get(name)
    if held is None or [t.shape for t in held] != [t.shape for t in like]:
        return None
    return [
        t.to(device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
        for t, g in zip(held, like, strict=True)
    ]
