"""The step on the micro-batches of an update: what stands between Trainer's ``training_step`` and the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from hf_sage.engine import (
    FeatureTap,
    Part,
    StepReport,
    Verdict,
    apply_hook,
    descend,
    mean_over_ranks,
    same_running_statistics,
    step_seed,
    two_pass_step,
)
from hf_sage.engine.distributed import gathered, sum_over_ranks
from hf_sage.engine.precision import full_precision, groups_at_fault
from hf_sage.engine.step import all_finite, trainable
from hf_sage.hooks import WeightHook
from hf_sage.methods import Method
from hf_sage.rules import Memory, Step
from hf_sage.trainer.auxiliary import AuxiliaryBatches, auxiliary_parts
from hf_sage.trainer.groups import decode_groups
from hf_sage.trainer.logs import StepLog
from hf_sage.trainer.loss import count_items, divides_by_items
from hf_sage.trainer.settings import Settings
from hf_sage.trainer.window import Inputs, Rows, as_joint, as_parts, cut, items_by_group

COUNTERS = ("_metrics", "_total_train_tokens", "accum_loss_components")
"""Where TRL's trainers and sentence-transformers' count in compute_loss."""


class TwoPasses(Settings):
    """``training_step`` by the two-pass step of `hf_sage.engine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_log = StepLog()
        self._class_names: dict[str, str] = {}  # what the integers of the domain column stand for
        self._window: list[Inputs] = []
        self._report: StepReport | None = None
        self._look_back: Callable[[], dict[str, Tensor]] | None = None
        self._loss_divides_by_items: bool | None = None
        self._step = Step()
        self._memories: dict[str, Memory] = {}  # what the method's rules remember
        self._tap: FeatureTap | None = None  # this and the next are there where the method needs them
        self._auxiliary: AuxiliaryBatches | None = None
        self._verdict = Verdict()

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
        self._window.append(copy(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        if (every := self.args.torch_empty_cache_steps) and self.state.global_step % every == 0:
            clear_device_cache()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers, as Trainer does
            self.optimizer.train()
        # Gradients are averaged over ranks below: DistributedDataParallel would average K+1 times, at the wrong points.
        with self.accelerator.no_sync(model), self._precision():
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
        divisor = float(num_items) if divides and num_items is not None else None
        if divisor is not None:
            # The loss is already divided, by the items of all ranks or of this one: then Trainer scales it accordingly.
            over_ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            weight = over_ranks / divisor
        else:
            weight = self.args.world_size / sum(items.values())

        def loss(inputs: Inputs) -> Tensor:
            prepared = self._prepare_inputs(copy(inputs))  # its own copy for each pass: compute_loss pops the labels
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, prepared, num_items_in_batch=num_items if divides else None)
            return value  # type: ignore[no-any-return]

        local = self.sage_args.perturbation_scope == "local"
        self._step = self._step_now()
        if method.hook is not None:
            parts = as_parts(rows, loss, weight, scale_loss=not divides)
            done = self._apply_hook(model, method.hook, parts, list(items))
            if done is not None:
                return done
        auxiliary = self._auxiliary_parts(method, loss, divisor)  # once: it takes all ranks
        one_by_one = local or len(window) == 1  # the gradients of several micro-batches are compared by their sums
        reports = [
            two_pass_step(
                model,
                as_parts(chunk, loss, weight, scale_loss=not divides),
                method,
                step=self._step,
                memories=self._memories,
                backward=self.accelerator.backward,
                groups=None if local and chunk else list(items),
                reduce=None if local else mean_over_ranks,
                same_dropout=self.sage_args.same_dropout,
                inspect=self._inspect if self._step_log.precision.is_due and self.args.process_index == 0 else None,
                parameters=self._parameters(model),
                second_pass=self._unnoticed,
                auxiliary=auxiliary,
                tap=self._tap,
                joint=as_joint(chunk, loss, weight, self._verdict, scale_loss=not divides) if one_by_one else None,
            )
            for chunk in ([own for own in pieces if own] or [[]] if local else [rows])
        ]
        report = StepReport.merge(reports)
        same_running_statistics(model)  # for evaluations and checkpoints, too
        if local:
            self._average_gradients(model)
            # The noise must be the same on all ranks, and so must be whether there is any.
            has_rows, is_broken = float(bool(rows)), float(not report.is_finite)
            own = report.agreement.new_tensor([0.0, has_rows, is_broken])
            own[0] = report.agreement * has_rows
            agreement, ranks, broken = sum_over_ranks(own.to(self.args.device))
            report = replace(report, agreement=agreement / ranks, is_finite=not broken)
        if not report.is_finite and self.accelerator.scaler is None and self._step_log.skipped.wants_groups:
            parts = as_parts(rows, loss, weight, scale_loss=not divides)
            found = groups_at_fault(model, parts, self.accelerator.backward)
            self._step_log.skipped.groups = [self._class_names.get(str(group), str(group)) for group in found]
        return report

    def _step_now(self) -> Step:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        scaler = self.accelerator.scaler
        return Step(
            number=self.state.global_step,
            seed=step_seed(self.args.seed, self.state.global_step),
            learning_rate=float(groups[0]["lr"]) if groups else 0.0,
            gradient_scale=1.0 if scaler is None else float(scaler.get_scale()),
        )

    def _apply_hook(
        self, model: nn.Module, hook: WeightHook, parts: list[Part], groups: list[str | None]
    ) -> StepReport | None:
        step = replace(self._step, memory=self._memories.setdefault("hook", {}))
        with self._unnoticed() if not hook.replaces_update else nullcontext():
            done = apply_hook(
                model,
                parts,
                hook,
                step,
                self.optimizer.step,
                backward=self.accelerator.backward,
                groups=groups,
                reduce=mean_over_ranks,
                parameters=self._parameters(model),
            )
        if done is None:  # otherwise they are in the report of the step
            self._step_log.add_facts(step.facts)
        return done

    def _auxiliary_parts(
        self, method: Method, loss: Callable[[Inputs], Tensor], divisor: float | None
    ) -> list[Part] | None:
        """This rank's rows of the auxiliary batch of this update; ``None`` where nothing is perturbed."""
        if self._auxiliary is None or not method.perturbs_in(self._step.number):
            return None
        inputs = self._auxiliary.inputs(self._step.number, self.args.process_index, self.args.world_size)
        pieces = [] if inputs is None else cut(self._without_domain(inputs), None, self._count_items)
        return auxiliary_parts(pieces, loss, divisor, self.args.world_size)

    def _cut(self, inputs: Inputs, method: Method) -> list[Rows]:
        groups = None
        if self._column is not None and isinstance(inputs, MutableMapping):  # a tokenizer's BatchEncoding is no dict
            groups = inputs.pop(self._column, None)
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
        return count_items(inputs, rows, shifts_labels=bool(self._loss_shifts_labels))

    def _measure_loss(self, model: nn.Module, rows: list[Rows], num_items: Tensor | int | None) -> bool:
        """Whether the loss is divided by ``num_items``; if Trainer took it for granted and is wrong, tells it."""
        if num_items is None:
            return False
        if self._loss_divides_by_items is None:

            def loss(items: Tensor | int) -> Tensor:
                with self.compute_loss_context_manager():
                    prepared = self._prepare_inputs(copy(rows[0].inputs))
                    return self.compute_loss(model, prepared, num_items_in_batch=items)  # type: ignore[no-any-return]

            model.train()
            with self._unnoticed():
                own = divides_by_items(loss, num_items, model) if rows else None
            # A rank without rows to tell by takes over what another has found.
            self._loss_divides_by_items = next((found for found in gathered(own) if found is not None), None)
            if self._loss_divides_by_items is False:
                self.model_accepts_loss_kwargs = False
                self.loss_is_scaled_for_ga = False
        return self._loss_divides_by_items is not False  # until a loss can tell, what Trainer takes for granted

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Puts back what trainers known to count in compute_loss counted: TRL's, sentence-transformers'."""
        kept = {name: deepcopy(self.__dict__[name]) for name in COUNTERS if name in self.__dict__}
        try:
            yield
        finally:
            self.__dict__.update(kept)

    def _parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's, and those that only the optimizer knows: a loss may have parameters of its own."""
        parameters = trainable(model)
        known = {id(p) for p in parameters}
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return parameters + [p for g in groups for p in g["params"] if p.requires_grad and id(p) not in known]

    def _average_gradients(self, model: nn.Module) -> None:
        parameters = self._parameters(model)
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
        parameters = self._parameters(self.model)
        if not (report.is_finite and all_finite([p.grad for p in parameters if p.grad is not None])):
            has_scaler = self.accelerator.scaler is not None
            self._step_log.skipped.add(report, self.state.global_step + 1, warns=not has_scaler)
            for p in () if has_scaler else parameters:
                p.grad = None
            return
        self._step_log.add(report, descend(self.model, self.sage_method, report, self._step, parameters))
        self._look_back = report.look_back

    def look_back(self) -> None:
        """Lets the ascent see the batch again where it wants to; called right after the optimizer's step."""
        look_back, self._look_back = self._look_back, None
        if look_back is not None:
            with self.accelerator.no_sync(self.model_wrapped), self._precision():
                self._step_log.add_facts(look_back())

    def _precision(self) -> AbstractContextManager[None]:
        """What the passes run in: the trainer's own precision, or fp32 where that is asked for."""
        in_fp32 = self.sage_args.full_precision_passes
        return full_precision(self.model, self.args.device.type) if in_fp32 else nullcontext()

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
        if self._column is None or not isinstance(inputs, Mapping):
            return inputs
        return {name: value for name, value in inputs.items() if name != self._column}
