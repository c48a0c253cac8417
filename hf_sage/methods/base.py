"""What every method is: an ascent, a chain of corrections, an objective and a hook under a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_sage.ascents import Ascent
from hf_sage.corrections import Correction
from hf_sage.hooks import WeightHook
from hf_sage.objectives import FeatureObjective, Objective
from hf_sage.rules import Need, Rule


@dataclass(frozen=True)
class Method:
    """A rule for one update: what is descended, where the second gradient is taken, and what is done to it.

    Attributes:
        name: What tables and logs call it.
        ascent: Rule for ε, or ``None`` for no second pass.
        corrections: Rules applied to the gradient, in order.
        objective: What is descended in place of the mean loss of the batch; ``None`` is that.
        hook: A rule that moves the weights before the update or in place of it.
        ascent_interval: The second pass is taken in every so-manieth update, beginning with the first.

    Raises:
        ValueError: If the parts do not go together.
    """

    name: str
    ascent: Ascent | None = None
    corrections: tuple[Correction, ...] = ()
    objective: Objective | None = None
    hook: WeightHook | None = None
    ascent_interval: int = 1

    def __post_init__(self) -> None:
        interval = self.ascent_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"ascent_interval must be a whole number, 1 or more; got {interval!r}.")
        if self.hook is not None and self.hook.replaces_update and (self.ascent or self.corrections or self.objective):
            raise ValueError(
                f"{type(self.hook).__name__} is the whole update, so an ascent, corrections or an objective never act. "
                "Leave them out, or take a hook that does not replace the update."
            )
        others = [rule for rule in (self.ascent, *self.corrections) if rule is not None and "groups" in rule.needs]
        if isinstance(self.objective, FeatureObjective) and others:
            raise ValueError(
                f"{type(self.objective).__name__} ties the groups' losses together, so the groups have no gradients of "
                f"their own, which {type(others[0]).__name__} needs. Combine it with rules that do not need groups."
            )

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules by the name that their memories are saved under."""
        return dict(self._rules())

    def _rules(self) -> Iterator[tuple[str, Rule]]:
        for name, rule in (("objective", self.objective), ("hook", self.hook), ("ascent", self.ascent)):
            if rule is not None:
                yield name, rule
        for i, correction in enumerate(self.corrections):
            yield f"correction {i}", correction

    @property
    def needs(self) -> frozenset[Need]:
        """What the rules cannot do without."""
        return frozenset[Need]().union(*(rule.needs for rule in self.rules.values()))

    @property
    def perturbs(self) -> bool:
        """Whether second passes at θ + ε are due."""
        return self.ascent is not None and self.ascent.rho > 0

    def perturbs_in(self, number: int) -> bool:
        """Whether a second pass is due in the update of this number, counted from 0."""
        return self.perturbs and number % self.ascent_interval == 0

    @property
    def needs_groups(self) -> bool:
        """Whether the gradient or the loss of each group is needed."""
        return "groups" in self.needs

    @property
    def combines(self) -> bool:
        """Whether a correction combines the clean gradient with the perturbed one."""
        return any(not correction.after_clipping for correction in self.corrections)

    @property
    def is_plain(self) -> bool:
        """Whether the update is that of the base optimizer alone (law 1)."""
        return not self.perturbs and self.objective is None and self.hook is None and not self._acting

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch a step, on average and without `hessian_products`; ERM's is 1."""
        own = 0.0 if self.hook is not None and self.hook.replaces_update else 1.0
        by_rules = sum(rule.passes * share for rule, share in self._shares)
        return own + by_rules + (1 / self.ascent_interval if self.perturbs else 0.0)

    @property
    def auxiliary_passes(self) -> float:
        """Forward and backward passes over the auxiliary batch a step, on average."""
        return sum(rule.auxiliary_passes * share for rule, share in self._shares)

    @property
    def hessian_products(self) -> float:
        """Products with the batch's Hessian a step, on average; each is one forward and two backward passes."""
        return sum(rule.hessian_products for rule, _ in self._shares)

    @property
    def forwards(self) -> float:
        """Forward passes over the batch a step, on average."""
        return self.passes + self.hessian_products

    @property
    def backwards(self) -> float:
        """Backward passes over the batch a step, on average."""
        return self.passes + 2 * self.hessian_products

    @property
    def _acting(self) -> list[Correction]:
        """The corrections that change something in some step."""
        return [c for c in self.corrections if not c.is_null and (self.perturbs or not c.needs_perturbation)]

    @property
    def _shares(self) -> list[tuple[Rule, float]]:
        """The rules that act, and the share of the steps in which each does."""
        perturbed = 1 / self.ascent_interval
        found: list[tuple[Rule, float]] = [(rule, 1.0) for rule in (self.objective, self.hook) if rule is not None]
        if self.ascent is not None and self.perturbs:
            found.append((self.ascent, perturbed))
        return found + [(c, perturbed if c.needs_perturbation else 1.0) for c in self._acting]
