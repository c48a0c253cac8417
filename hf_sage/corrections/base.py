"""What every correction is: a rule that turns the perturbed gradient into the gradient that is descended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hf_sage.rules import Rule, Step


@dataclass
class Descent:
    """What a correction may use besides the gradient.

    Attributes:
        agreement: S over the groups of this step, 0-dimensional.
        step: The step.
        parameters: The parameters θ that the gradients belong to.
        clean: The mean gradient ḡ at θ, a tensor for each gradient, for rules that act before clipping; empty after it.
        perturbed: Whether the gradient was taken at θ + ε; if not it *is* ḡ.
    """

    agreement: Tensor
    step: Step = field(default_factory=Step)
    parameters: Sequence[Tensor] = ()
    clean: Sequence[Tensor] = ()
    perturbed: bool = True


class Correction(Rule, ABC):
    """A rule applied to the gradient, in the order of the method's chain.

    Attributes:
        after_clipping: Noise comes after clipping, which would otherwise shrink and count it; what combines the clean
            and the perturbed gradient comes before.
        needs_perturbation: Whether the rule is left out where the gradient was not taken at θ + ε: there the clean and
            the perturbed gradient are one.
    """

    after_clipping: ClassVar[bool] = False
    needs_perturbation: ClassVar[bool] = False

    @property
    def is_null(self) -> bool:
        """Whether the rule changes nothing, whatever the gradient."""
        return False

    @abstractmethod
    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects the gradients in place.

        Returns:
            Entries for the log, 0-dimensional; none is fine.
        """
