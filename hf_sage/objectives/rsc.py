"""RSC: what the classifier leans on most is taken from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from hf_sage.objectives.base import FeatureObjective, Rows
from hf_sage.rules import Step


@dataclass(frozen=True)
class RSC(FeatureObjective):
    """Cross entropy on features with the most decisive ones muted (Huang et al. 2020, arXiv 2007.02454, Algorithm 1).

    For each row the features whose derivative of the true logit is in the top ``drop_features`` are set to zero; the
    mask stays for the share ``drop_rows`` of the batch whose confidence it lowers most, and is lifted for the others.

    Features at the quantile are muted, as in DomainBed. Rows at the quantile are not, as in the authors' code, so that
    no more than the share is muted however many rows tie. DomainBed mutes those too: one row more where the quantile is
    a row's own value (batches of 3n + 1 rows at the default), and all rows where all tie. They do so, features and
    rows, under a classifier of zeros, whose weights would then have no gradient and stay zero.

    Attributes:
        drop_features: Share of the features to mute, default 1/3 (DomainBed's ``rsc_f_drop_factor``).
        drop_rows: Share of the rows to mute them in, default 1/3 (``rsc_b_drop_factor``).
    """

    drop_features: float = 1 / 3
    drop_rows: float = 1 / 3

    replaces_loss: ClassVar[bool] = True

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`."""
        features = torch.cat([rows.features for rows in groups.values()])
        labels = torch.cat([rows.labels for rows in groups.values()])
        keep = self._mask(features.detach(), labels, head).to(features.dtype)
        return cross_entropy(head(features * keep), labels)

    def _mask(self, features: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """True where a feature is kept, of the shape of ``features``."""
        leaf = features.clone().requires_grad_()
        logits = head(leaf)
        own = logits.gather(1, labels.unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(own, leaf)
        with torch.no_grad():
            slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
            keep = slope < torch.quantile(slope, 1 - self.drop_features, dim=1, keepdim=True)
            before = softmax(logits, dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
            after = softmax(head(features * keep), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
            drop = (before - after).to(slope.dtype)
            muted = drop > torch.quantile(drop, 1 - self.drop_rows)
        return keep | ~muted.unsqueeze(1)
