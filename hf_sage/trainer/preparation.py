"""What a method is given, and what is said about it, when a training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from transformers import Trainer

from hf_sage.engine import FeatureTap, RandomState
from hf_sage.trainer.auxiliary import SHARE, AuxiliaryBatches
from hf_sage.trainer.batches import has_rows
from hf_sage.trainer.groups import domains_of
from hf_sage.trainer.needs import check_labels, check_needs, warn_of_delays
from hf_sage.trainer.two_passes import TwoPasses
from hf_sage.trainer.window import Inputs


class Preparation(TwoPasses):
    """Gives the step what its method needs, before the first."""

    def _prepare_method(self) -> None:
        """Sees to what the method needs; called when a training begins.

        Raises:
            ValueError: If something is not to be had.
        """
        method, args = self.sage_method, self.sage_args
        check_needs(method, self.model, args.domain_column, args.perturbation_scope, self.accelerator.scaler)
        if "features" in method.needs and (batch := self._first_row()) is not None:
            check_labels(method, batch)
        if self.args.process_index == 0:
            warn_of_delays(method, self.state.max_steps)
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

    def _first_row(self) -> Inputs | None:
        """A batch of the first row, as the step would get it; ``None`` where only training can tell."""
        makes_its_own = (
            type(self).get_train_dataloader is not Trainer.get_train_dataloader
            or type(self).training_step is not TwoPasses.training_step
        )
        if makes_its_own or not has_rows(self.train_dataset):
            return None
        dataset, collator = self._dataset_and_collator("training")
        state = RandomState.capture()  # an augmentation draws numbers that are the training's
        try:
            batch = collator([dataset[0]])
        except Exception:  # it may want more rows than one; what is really wrong, training says in its own words
            return None
        finally:
            state.restore()
        return self._without_domain(dict(batch)) if isinstance(batch, Mapping) else None

    def _dataset_and_collator(self, description: str) -> tuple[Any, Any]:
        """The training set and the collator without the columns that the model does not take, as Trainer has them."""
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=description), collator
        return dataset, self._get_collator_with_removed_columns(collator, description=description)
