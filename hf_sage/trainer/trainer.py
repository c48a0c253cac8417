"""`transformers.Trainer` with one method replaced: ``training_step`` is the two-pass step of `hf_sage.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sage.engine import (
    StepReport,
    descend,
    mean_over_ranks,
    same_running_statistics,
    step_seed,
    two_pass_step,
)
from hf_sage.engine.distributed import sum_over_ranks
from hf_sage.engine.precision import full_precision, groups_at_fault
from hf_sage.engine.step import all_finite, trainable
from hf_sage.methods import Method
from hf_sage.trainer.collator import DomainCollator
from hf_sage.trainer.config import SAGEArguments
from hf_sage.trainer.evaluation import Metrics, average_and_worst, metrics_by_domain
from hf_sage.trainer.groups import check_column, class_names, decode_groups, domains_of
from hf_sage.trainer.logs import StepLog
from hf_sage.trainer.loss import count_items, divides_by_items
from hf_sage.trainer.publish import PublishMixin
from hf_sage.trainer.refusals import refuse_what_cannot_be_exact
from hf_sage.trainer.sampler import DomainBalancedSampler
from hf_sage.trainer.window import Inputs, Rows, as_parts, cut, items_by_group

if TYPE_CHECKING:
    _Base: TypeAlias = Trainer
else:
    _Base = object


class SAGEMixin(PublishMixin, _Base):
    """The two-pass, group-aware step on top of `transformers.Trainer` or any subclass of it.

    Put it first among the bases: ``class SAGESFTTrainer(SAGEMixin, SFTTrainer): ...``. The arguments may be a
    `SAGEConfig`, any arguments class combined with `SAGEArguments`, or plain ones, which get SAGE's defaults.

    What changes against the base: ``training_step``; rows come balanced over domains (``domain_sampling``); the domain
    column reaches the step and never the model; log entries and evaluation metrics by domain. The optimizer, scheduler,
    clipping, loss scaling, checkpoints and callbacks are the base's.

    Raises:
        ValueError: If the training set lacks the domain column or has fewer than two domains, or if the set-up
            (DeepSpeed, FSDP, DataParallel, optimizers that step inside backward) cannot give the exact step.
    """

    data_collator: Any
    compute_metrics: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_what_cannot_be_exact(self.args, self.accelerator, self.sage_method)
        self._sampler: DomainBalancedSampler | None = None
        self._class_names: dict[str, str] = {}  # of the training set's domain column, if that is a ClassLabel
        if self._column is not None:
            self.data_collator = DomainCollator(self.data_collator, self._column)
            if self.train_dataset is not None:
                check_column(self.train_dataset, self._column)
        self._window: list[Inputs] = []
        self._report: StepReport | None = None
        self._step_log = StepLog()
        self._loss_divides_by_items: bool | None = None
        self._evaluated_domains: list[Tensor] = []
        self.add_callback(_StepHooks(self))

    @property
    def sage_args(self) -> SAGEArguments:
        """The fields of this step: those of the trainer's arguments, or SAGE's defaults beside plain ones."""
        return self.args if isinstance(self.args, SAGEArguments) else SAGEArguments()

    @property
    def sage_method(self) -> Method:
        """The method that the arguments describe now: a hyperparameter search changes them between trainings."""
        return self.sage_args.build_method()

    @property
    def _column(self) -> str | None:
        return self.sage_args.domain_column

    # ---- The step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collects the micro-batches of an update and, with the last of them, runs the two-pass step on them all.

        Returns:
            The clean loss of the whole update with the last micro-batch, 0 with those before it, so that what Trainer
            adds up and logs is the clean loss.
        """
        method = self.sage_method
        if method.is_plain:
            inputs = self._without_domain(inputs)
            # One micro-batch is the whole batch, however its loss is normalised.
            whole = self.args.gradient_accumulation_steps * self.args.world_size == 1
            divides = whole or self._measure_loss(model, cut(inputs, None, self._count_items), num_items_in_batch)
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch if divides else None)
            return loss
        self._window.append(dict(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers, as Trainer does
            self.optimizer.train()
        # Gradients are averaged over ranks below: DistributedDataParallel would average K+1 times, at the wrong points.
        in_fp32 = self.sage_args.full_precision_passes
        precision = full_precision(self.model, self.args.device.type) if in_fp32 else nullcontext()
        with self.accelerator.no_sync(model), precision:
            self._report = self._two_passes(model, method, window, num_items_in_batch)
        return torch.zeros((), device=self.args.device) if self._report is None else self._report.loss

    def _two_passes(
        self, model: nn.Module, method: Method, window: list[Inputs], num_items: Tensor | int | None
    ) -> StepReport | None:
        """The step on all micro-batches; ``None`` where no row on any rank has a label to learn from."""
        pieces = [self._cut(inputs, method) for inputs in window]
        rows = [piece for micro_batch in pieces for piece in micro_batch]
        divides = self._measure_loss(model, rows, num_items)
        items = items_by_group(rows)
        if not items:
            return None
        same_running_statistics(model)
        if divides:
            # The loss is already divided, by the items of all ranks or of this one: then Trainer scales it accordingly.
            over_ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            weight = over_ranks / float(num_items)  # type: ignore[arg-type]
        else:
            weight = self.args.world_size / sum(items.values())

        def loss(inputs: Inputs) -> Tensor:
            prepared = self._prepare_inputs(dict(inputs))  # its own copy for each pass: compute_loss pops the labels
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, prepared, num_items_in_batch=num_items if divides else None)
            return value  # type: ignore[no-any-return]

        local = self.sage_args.perturbation_scope == "local"
        reports = [
            two_pass_step(
                model,
                as_parts(chunk, loss, weight, scale_loss=not divides),
                method,
                backward=self.accelerator.backward,
                groups=None if local and chunk else list(items),
                reduce=None if local else mean_over_ranks,
                same_dropout=self.sage_args.same_dropout,
                inspect=self._inspect if self._step_log.precision.is_due and self.args.process_index == 0 else None,
            )
            for chunk in ([own for own in pieces if own] or [[]] if local else [rows])
        ]
        report = StepReport.merge(reports)
        if local or report.perturbed_loss is not None:
            self._average_gradients(model)
        if local:  # the noise must be the same on all ranks, and so must be whether there is any
            own = torch.stack([report.agreement, torch.full_like(report.agreement, not report.is_finite)])
            agreement, broken = sum_over_ranks(own) / self.args.world_size
            report = replace(report, agreement=agreement, is_finite=not broken)
        if not report.is_finite and self.accelerator.scaler is None and self._step_log.skipped.wants_groups:
            parts = as_parts(rows, loss, weight, scale_loss=not divides)
            found = groups_at_fault(model, parts, self.accelerator.backward)
            self._step_log.skipped.groups = [self._class_names.get(str(group), str(group)) for group in found]
        return report

    def _cut(self, inputs: Inputs, method: Method) -> list[Rows]:
        groups = inputs.pop(self._column, None) if self._column is not None else None
        if not method.needs_groups:
            return cut(inputs, None, self._count_items)
        if groups is None and self._column is not None:
            raise ValueError(
                f"The batch has no domain column {self._column!r}; it has: {', '.join(map(repr, inputs))}. "
                "Keep the column in the dataset (a transform may have dropped it), or train without groups "
                "by domain_column=None."
            )
        return cut(inputs, None if groups is None else decode_groups(groups), self._count_items)

    def _count_items(self, inputs: Inputs, rows: int) -> int:
        # Older releases count label items unshifted and have no such attribute.
        return count_items(inputs, rows, shifts_labels=bool(getattr(self, "_loss_shifts_labels", False)))

    def _measure_loss(self, model: nn.Module, rows: list[Rows], num_items: Tensor | int | None) -> bool:
        """Whether the loss is divided by ``num_items``; if Trainer took it for granted and is wrong, tells it."""
        if num_items is None:
            return False
        if self._loss_divides_by_items is None and rows:

            def loss(items: Tensor | int) -> Tensor:
                with self.compute_loss_context_manager():
                    prepared = self._prepare_inputs(dict(rows[0].inputs))
                    return self.compute_loss(model, prepared, num_items_in_batch=items)  # type: ignore[no-any-return]

            model.train()
            self._loss_divides_by_items = divides_by_items(loss, num_items, model)
            if self._loss_divides_by_items is False:
                self.model_accepts_loss_kwargs = False
                self.loss_is_scaled_for_ga = False
        return self._loss_divides_by_items is not False  # until a loss can tell, what Trainer takes for granted

    def _average_gradients(self, model: nn.Module) -> None:
        parameters = trainable(model)
        for p, g in zip(parameters, mean_over_ranks([p.grad for p in parameters], parameters), strict=True):
            p.grad = g

    def finish_step(self) -> None:
        """Applies the method's corrections to the clipped gradient; called right before the optimizer's step.

        A gradient that is not finite is dropped, so that the optimizer changes nothing; a GradScaler sees to it itself.
        All ranks do the same, because the gradient is the same on them all.
        """
        report, self._report = self._report, None
        if report is None:
            return
        parameters = trainable(self.model)
        if not (report.is_finite and all_finite([p.grad for p in parameters if p.grad is not None])):
            has_scaler = self.accelerator.scaler is not None
            self._step_log.skipped.add(report, self.state.global_step + 1, warns=not has_scaler)
            for p in () if has_scaler else parameters:
                p.grad = None
            return
        seed = step_seed(self.args.seed, self.state.global_step)
        self._step_log.add(report, descend(self.model, self.sage_method, report, seed))

    def _inspect(self, theta: Sequence[Tensor], epsilon: Sequence[Tensor]) -> None:
        """Measures what the forward pass will see of ε."""
        device, autocast = self.args.device.type, None
        if not self.sage_args.full_precision_passes:
            with self.accelerator.autocast():
                autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._step_log.precision.inspect(theta, epsilon, autocast)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base computes it, without the domain column."""
        return super().compute_loss(model, self._without_domain(inputs), *args, **kwargs)

    def _without_domain(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != self._column} if self._column else inputs

    # ---- Data ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._column is not None and self._column not in self._signature_columns:
            self._signature_columns.append(self._column)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self._column is None or not _has_rows(dataset):
            return super()._get_train_sampler(dataset)
        check_column(dataset, self._column)
        self._class_names = class_names(dataset, self._column)
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
        batch = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = DomainBalancedSampler(domains, batch, seed)
        return self._sampler

    def _set_epoch(self, epoch: int) -> None:
        # accelerate does not pass the epoch on when it resumes in the middle of one on several ranks.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    # ---- Logs and evaluation ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training entry what the steps since the last one found."""
        if "loss" in logs:
            logs |= self._step_log.pop(self._class_names)
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """As the base evaluates, and for a dictionary of datasets also the average and the worst over them."""
        metrics: Metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        sets = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(sets, dict):
            own = {name: _with_prefix(metrics, f"{metric_key_prefix}_{name}_") for name in sets}
            summary = {f"{metric_key_prefix}_{key}": value for key, value in average_and_worst(own).items()}
            metrics |= summary
            self.log(dict(summary))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base's, with ``compute_metrics`` applied by domain too where the rows have one."""
        compute, self._evaluated_domains = self.compute_metrics, []
        names = class_names(getattr(dataloader, "dataset", None), self._column) if self._column else {}

        def by_domain(prediction: EvalPrediction) -> Metrics:
            if not self._evaluated_domains:
                return dict(compute(prediction))
            domains = [names.get(name, name) for d in self._evaluated_domains for name in decode_groups(d)]
            return metrics_by_domain(compute, prediction, domains)

        # Metrics made batch by batch, and batches left apart, have no rows that could be told by domain.
        if compute is not None and not self.args.batch_eval_metrics and self.args.eval_do_concat_batches:
            self.compute_metrics = by_domain
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = compute

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base's, with the domains of the rows gathered in the order of the predictions."""
        domains = inputs.get(self._column) if self._column else None
        if domains is not None and self.compute_metrics is not None:
            self._evaluated_domains.append(self.gather_function(self._prepare_input(domains)))
        return super().prediction_step(model, self._without_domain(inputs), *args, **kwargs)


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
    """The two moments of an update that Trainer announces by callbacks."""

    def __init__(self, trainer: SAGEMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the steps of an earlier training that were never logged."""
        self._trainer._step_log = StepLog()

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


def _has_rows(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _with_prefix(metrics: Metrics, prefix: str) -> Metrics:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
