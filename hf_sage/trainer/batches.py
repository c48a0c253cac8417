"""The domain column in Trainer's data: kept for the step, and balanced in every batch."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import IterableDataset

from hf_sage.trainer.collator import DomainCollator
from hf_sage.trainer.groups import check_column, domains_of
from hf_sage.trainer.sampler import DomainBalancedSampler
from hf_sage.trainer.settings import Settings


class DomainBatches(Settings):
    """Batches that hold the domains in equal numbers and tell the domain of each row."""

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sampler: DomainBalancedSampler | None = None
        if self._column is not None:
            self.data_collator = DomainCollator(self.data_collator, self._column)
            if self.train_dataset is not None:
                check_column(self.train_dataset, self._column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._column is not None and self._column not in self._signature_columns:
            self._signature_columns.append(self._column)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self._column in dataset.column_names and self.args.remove_unused_columns:
            # Where the domain is all that is left, the base says what to do about it.
            super()._remove_unused_columns(dataset.remove_columns(self._column), description)
        return super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self._column is None or not has_rows(dataset):
            return super()._get_train_sampler(dataset)
        check_column(dataset, self._column)
        method = self.sage_method
        natural = self.sage_args.domain_sampling == "natural"
        if natural and (method.is_plain or not method.needs_groups):
            return super()._get_train_sampler(dataset)
        domains = domains_of(dataset, self._column)
        found = set(domains)
        if method.needs_groups and not method.is_plain and len(found) < 2:
            raise ValueError(
                f"Method {method.name!r} compares the gradients of at least two domains; column "
                f"{self._column!r} has {len(found)}. Add data of another domain, or train without groups by "
                "domain_column=None."
            )
        if natural:
            return super()._get_train_sampler(dataset)
        local = self.sage_args.perturbation_scope == "local"
        if method.needs_groups and local and self._train_batch_size < len(found):
            raise ValueError(
                f"With perturbation_scope='local' each micro-batch has its own agreement, and {self._train_batch_size} "
                f"rows cannot hold {len(found)} domains. Raise per_device_train_batch_size to {len(found)} or more."
            )
        if (strategy := self.args.train_sampling_strategy) != "random":
            warnings.warn(
                f"train_sampling_strategy={strategy!r} has no effect beside domain_sampling='balanced', the default. "
                "Choose domain_sampling='natural' for it.",
                stacklevel=2,
            )
        self._sampler = DomainBalancedSampler(domains, self._rows_per_update, self._data_seed)
        return self._sampler

    def _check_sampling(self) -> None:
        """Warns where the base makes batches of its own, so that ``domain_sampling`` has nothing to say."""
        if (
            self._column is not None
            and self.sage_args.domain_sampling == "balanced"
            and has_rows(self.train_dataset)
            and not isinstance(self.train_dataset, IterableDataset)
            and self._sampler is None
        ):
            warnings.warn(
                f"{type(self).__name__} samples its batches itself, so they are not balanced over domains. Say so by "
                'domain_sampling="natural", or give it a sampler that balances them.',
                stacklevel=2,
            )

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """sentence-transformers': its samplers compare the rows' texts, which the domain is none of."""
        if self._column is not None and self._column in dataset.column_names:
            dataset = dataset.remove_columns(self._column)
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def _set_epoch(self, epoch: int) -> None:
        # accelerate does not pass the epoch on when it resumes in the middle of one on several ranks.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)


def has_rows(dataset: Any) -> bool:
    """Whether the rows of a dataset can be counted and taken one by one, as a sampler does."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
