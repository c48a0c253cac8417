"""Tells a collator where the training is; a module of its own, because the other data needs no Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sage.data.images import ImageCollator


class DrawsCallback(TrainerCallback):
    """Makes a collator's augmentations a function of the run's seed and the batch's place; see `BatchDraws`.

    Example:
        >>> collator = ImageCollator(processor, augment=image_transforms("swad", processor).train)  # doctest: +SKIP
        >>> trainer = SAGETrainer(..., data_collator=collator, callbacks=[DrawsCallback(collator)])  # doctest: +SKIP
    """

    def __init__(self, collator: ImageCollator) -> None:
        self._draws = collator.draws

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says with which update the epoch, or what is left of it, begins."""
        self._draws.begin_epoch(args.seed, state.global_step, args.gradient_accumulation_steps, args.process_index)
