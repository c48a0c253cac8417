"""GGA: weights from which the groups' gradients agree better are searched for before the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sage.hooks.base import WeightHook, WeightPasses
from hf_sage.rules import Step


@dataclass(frozen=True)
class GGA(WeightHook):
    """Gradient-guided annealing (Ballas & Diou 2025, arXiv 2502.20162): proposals θ + U(−n, n) in some early updates.

    A proposal takes the place of θ if the smallest cosine between two groups' gradients is larger there and the loss
    not more than ``tolerance`` above that of the best so far; proposals start from the best so far. Then comes an
    ordinary update. The authors' code goes back to the best weights only where a proposal is accepted, so that
    rejected noise adds up to a random walk; here each proposal is one draw. All trained parameters are moved, where
    the code moves the feature extractor's.

    Attributes:
        noise: n > 0, default 1e-5 (the authors' for most datasets).
        proposals: Proposals an update, default 250.
        begin: The first update with a search, default 100.
        end: The first update without one again, default 200.
        tolerance: By how much the loss may rise, default 0.1.
    """

    noise: float = 1e-5
    proposals: int = 250
    begin: int = 100
    end: int = 200
    tolerance: float = 0.1

    delayed_by: ClassVar[str | None] = "begin"

    @property
    def passes(self) -> float:
        """None: a training is mostly outside the search. Within it, one a proposal and one before the first."""
        return 0.0

    def __call__(self, parameters: Sequence[Tensor], passes: WeightPasses, step: Step) -> dict[str, Tensor]:
        """See `WeightHook`."""
        if not self.begin <= step.number < self.end:
            return {}
        gram, loss = passes.look()
        agreement, lowest = _smallest_cosine(gram), loss
        best = [p.detach().clone() for p in parameters]
        generators = {p.device: torch.Generator(p.device).manual_seed(step.seed) for p in parameters}
        accepted = torch.zeros((), dtype=torch.float64)
        for _ in range(self.proposals):
            with torch.no_grad():
                for p, b in zip(parameters, best, strict=True):
                    uniform = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generators[p.device])
                    p.copy_(b + self.noise * (2 * uniform - 1))
            gram, loss = passes.look()
            found = _smallest_cosine(gram)
            if found > agreement and loss < lowest + self.tolerance:
                agreement, lowest = found, torch.minimum(loss, lowest)
                accepted += 1
                for b, p in zip(best, parameters, strict=True):
                    b.copy_(p.detach())
        with torch.no_grad():
            for p, b in zip(parameters, best, strict=True):
                p.copy_(b)
        return {"proposals_accepted": accepted, "smallest_cosine": agreement}


def _smallest_cosine(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    cosines = gram / lengths.unsqueeze(0) / lengths.unsqueeze(1)
    rows, columns = torch.triu_indices(len(gram), len(gram), offset=1)
    return cosines[rows, columns].min() if len(rows) else torch.ones((), dtype=gram.dtype)
