"""What all parts of the mixin read: the fields of the step, the method they describe, the domain column."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from transformers import Trainer

from hf_sage.methods import Method
from hf_sage.trainer.config import SAGEArguments

if TYPE_CHECKING:
    Base: TypeAlias = Trainer
else:
    Base = object
"""What the parts of the mixin stand on: whichever trainer they are mixed into."""


class Settings(Base):
    """The trainer's arguments as this step reads them."""

    @property
    def sage_args(self) -> SAGEArguments:
        """The fields of this step: those of the trainer's arguments, or SAGE's defaults beside plain ones."""
        return self.args if isinstance(self.args, SAGEArguments) else SAGEArguments()

    @property
    def sage_method(self) -> Method:
        """The method that the arguments describe now: a hyperparameter search changes them between trainings."""
        return self.sage_args.build_method()

    @property
    def _rows_per_update(self) -> int:
        """Rows of one update over all ranks and accumulation steps."""
        return int(self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps)

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    @property
    def _column(self) -> str | None:
        return self.sage_args.domain_column
