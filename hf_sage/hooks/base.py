"""What every hook is: a rule that moves the weights themselves, before an update or in place of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from hf_sage.rules import Need, Rule, Step


class WeightPasses(Protocol):
    """What a hook may do with the batch of a step."""

    @property
    def groups(self) -> Sequence[Hashable]:
        """The groups of the batch, in an order all ranks share."""

    def update_on(self, group: Hashable) -> None:
        """One update of the base optimizer on the gradient of one group: one pass over its rows."""

    def look(self) -> tuple[Tensor, Tensor]:
        """The Gram matrix ``(K, K)`` of the groups' gradients at the weights as they are, and the batch's loss."""


class WeightHook(Rule, ABC):
    """A rule that moves the weights.

    Attributes:
        replaces_update: Whether the hook is the whole update; if not the method's step follows it.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"groups"})
    replaces_update: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, parameters: Sequence[Tensor], passes: WeightPasses, step: Step) -> dict[str, Tensor]:
        """Moves the parameters in place.

        Args:
            parameters: The trainable parameters θ.
            passes: What may be done with the batch.
            step: The step.

        Returns:
            Entries for the log, 0-dimensional; none is fine.
        """
