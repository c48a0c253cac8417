"""`transformers.Trainer` with one method replaced: ``training_step`` is the two-pass step of `hf_sage.engine`."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sage.engine import Verdict
from hf_sage.trainer.batches import DomainBatches
from hf_sage.trainer.checkpoints import Checkpoints
from hf_sage.trainer.evaluation import DomainEvaluation
from hf_sage.trainer.groups import class_names
from hf_sage.trainer.logs import StepLog
from hf_sage.trainer.preparation import Preparation
from hf_sage.trainer.publish import Publishing
from hf_sage.trainer.refusals import refuse_what_cannot_be_exact


class SAGEMixin(Preparation, DomainBatches, DomainEvaluation, Checkpoints, Publishing):
    """The two-pass, group-aware step on top of `transformers.Trainer` or any subclass of it.

    Put it first among the bases: ``class SAGESFTTrainer(SAGEMixin, SFTTrainer): ...``. The arguments may be a
    `SAGEConfig`, any arguments class combined with `SAGEArguments`, or plain ones, which get SAGE's defaults.

    What changes against the base: ``training_step``; rows come balanced over domains (``domain_sampling``); the domain
    column reaches the step and never the model; log entries and evaluation metrics by domain; training resumes only
    from checkpoints that were written whole. The optimizer, scheduler, clipping, loss scaling, checkpoints and
    callbacks are the base's.

    Raises:
        ValueError: If the training set lacks the domain column or has fewer than two domains, or if the set-up
            (DeepSpeed, FSDP, DataParallel, optimizers that step inside backward) cannot give the exact step.
        TypeError: If a class has it behind its trainer, whose ``training_step`` would then be taken.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(SAGEMixin):
            first = next(base.__name__ for base in cls.__bases__ if issubclass(base, Trainer))
            raise TypeError(f"{cls.__name__} would train without SAGE: write class {cls.__name__}(SAGEMixin, {first}).")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_what_cannot_be_exact(self.args, self.accelerator, self.model, self.sage_method)
        self.add_callback(_StepHooks(self))

    def begin(self) -> None:
        """Looks at the set-up, which a hyperparameter search changes between trainings; called when one begins."""
        refuse_what_cannot_be_exact(self.args, self.accelerator, self.model, self.sage_method)
        self._step_log = StepLog()  # steps of an earlier training that were never logged are forgotten
        self._verdict = Verdict()  # a search begins anew, with another model
        self._class_names = class_names(self.train_dataset, self._column) if self._column else {}
        self._check_sampling()
        self._prepare_method()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training entry what the steps since the last one found."""
        if "loss" in logs:
            logs |= self._step_log.pop(self._class_names)
        super().log(logs, *args, **kwargs)


class SAGETrainer(SAGEMixin, Trainer):
    """`transformers.Trainer` with SAGE's step: the same arguments in the same order; see `SAGEMixin`.

    Example:
        >>> trainer = SAGETrainer(
        ...     model=model,
        ...     args=SAGEConfig("out", rho=1e-6, gamma=1e-6, domain_column="domain"),
        ...     train_dataset=train,
        ... )  # doctest: +SKIP
    """


class _StepHooks(TrainerCallback):
    """The moments of an update that Trainer announces by callbacks."""

    def __init__(self, trainer: SAGEMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the set-up of this training."""
        self._trainer.begin()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the balanced sampler's window."""
        self._trainer._set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets micro-batches of an update that an exception cut short."""
        self._trainer._window.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping, before the optimizer."""
        self._trainer.finish_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step, with its gradients still in place."""
        self._trainer.look_back()
