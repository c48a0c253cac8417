"""What a method is given, and what is said about it, when a training begins."""

from __future__ import annotations

from typing import Any

import datasets

from hf_sage.engine import FeatureTap
from hf_sage.trainer.auxiliary import SHARE, AuxiliaryBatches
from hf_sage.trainer.batches import has_rows
from hf_sage.trainer.groups import domains_of
from hf_sage.trainer.needs import check_needs
from hf_sage.trainer.two_passes import TwoPasses


class Preparation(TwoPasses):
    """Gives the step what its method needs, before the first."""

    def _prepare_method(self) -> None:
        """Sees to what the method needs; called when a training begins.

        Raises:
            ValueError: If something is not to be had.
        """
        method, args = self.sage_method, self.sage_args
        check_needs(method, self.model, args.domain_column, args.perturbation_scope, self.accelerator.scaler)
        self._tap = FeatureTap(self.model, args.classifier) if "features" in method.needs else None
        self._auxiliary = self._auxiliary_batches() if "auxiliary" in method.needs else None

    def _auxiliary_batches(self) -> AuxiliaryBatches:
        if not has_rows(self.train_dataset):
            raise ValueError(
                f"Method {self.sage_method.name!r} draws auxiliary batches from the training set, which is a stream. "
                "Use a dataset whose rows can be taken by number."
            )
        balanced = self._column is not None and self.sage_args.domain_sampling == "balanced"
        rows = len(self.train_dataset)
        domains = domains_of(self.train_dataset, str(self._column)) if balanced else [""] * rows
        dataset, collator = self._dataset_and_collator("auxiliary")
        return AuxiliaryBatches(dataset, collator, domains, -(-self._rows_per_update // SHARE), self._data_seed)

    def _dataset_and_collator(self, description: str) -> tuple[Any, Any]:
        """The training set and the collator without the columns that the model does not take, as Trainer has them."""
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=description), collator
        return dataset, self._get_collator_with_removed_columns(collator, description=description)
