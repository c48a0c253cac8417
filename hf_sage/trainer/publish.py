"""Publishing from a trainer: our model card, no secrets, no local paths, and failures that say what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_sage.publishing import UPLOAD_ERRORS, explain, problems_of, render
from hf_sage.publishing.failures import TRANSPORT_ERROR
from hf_sage.publishing.privacy import hide_local_paths, veiled
from hf_sage.trainer.card import facts_of_trainer
from hf_sage.trainer.checkpoints import STATE
from hf_sage.trainer.settings import Settings

logger = logging.getLogger(__name__)


class Publishing(Settings):
    """`push_to_hub` and the pushes of ``hub_strategy``, fit for the public.

    What changes against the base: ``training_args.bin`` holds no token and no local path; a configuration that is
    pushed has no local path; the model card is ours (`hf_sage.publishing`); an upload that fails says what to do, also
    one in the background, whose failure the base passes over in silence.
    """

    args: Any
    push_in_progress: Any
    _is_publishing = False
    """Whether what is saved now is going to be uploaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with self._explaining(TRANSPORT_ERROR):
            super().__init__(*args, **kwargs)
        self.add_callback(_BestCheckpoint())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves as the base does, with arguments that pickle without secrets and local paths."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        with self._veiled_args():
            super()._save(output_dir, state_dict)
        if self._is_publishing and self.args.should_save:
            hide_local_paths(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads as the base does: with our card, and what the checkpoint says of this machine cut out first."""
        before = getattr(self, "push_in_progress", None)  # the base lets go of it once it is done
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            hide_local_paths(checkpoint_folder)
            _hide_best_checkpoint(Path(checkpoint_folder) / STATE)
            self.create_model_card(model_name=(self.hub_model_id or "").split("/")[-1] or None)
        with self._veiled_args():
            super()._push_from_checkpoint(checkpoint_folder)
        self._warn_of_failures(before)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads model, processor, configuration and model card, as the base does and with its arguments.

        Raises:
            Exception: What huggingface_hub raised, with a note on what to do. What was trained stays in
                ``args.output_dir``, and the same call goes on from what has arrived.
        """
        self._is_publishing = True
        try:
            with self._explaining(*UPLOAD_ERRORS):
                return super().push_to_hub(*args, **kwargs)
        finally:
            self._is_publishing = False

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Writes the card, ``README.md`` in ``args.output_dir``, from what the trainer knows and what is given.

        A base with a card of its own (sentence-transformers, TRL) knows better how its models are used: its card is
        written, with our tags.

        Args:
            language: Languages of the model, by their codes.
            license: Licence of the model, by the Hub's id.
            tags: More tags.
            model_name: The model's name; by default that of the output directory.
            finetuned_from: Hub id of the base model, where the model itself does not tell.
            tasks: The task, by the Hub's id; of several the first.
            dataset_tags: Hub ids of the datasets.
            dataset: The dataset's name.
            dataset_args: Its configuration, for the text.
            dataset_name: The same as ``dataset``, for trainers of TRL.

        Raises:
            ValueError: If the Hub would refuse the card; the message says why and what to do.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "model_name": model_name, "dataset_name": dataset_name}
        given |= {"finetuned_from": finetuned_from, "tasks": tasks, "dataset_tags": dataset_tags}
        given |= {"dataset": dataset, "dataset_args": dataset_args}
        if (theirs := super().create_model_card).__func__ is not Trainer.create_model_card:
            theirs(tags=["hf_sage", self.sage_method.name, *_as_list(tags)], **{k: v for k, v in given.items() if v})
            return
        ids, names = _as_list(dataset_tags), _as_list(dataset) or _as_list(dataset_name) or _as_list(dataset_tags)
        notes = [f"Configuration: {', '.join(_as_list(dataset_args))}."] if dataset_args else None
        facts = facts_of_trainer(
            self,
            self.sage_method,
            self._column,
            language=language,
            license=license,
            tags=_as_list(tags) or None,
            name=model_name,
            base_model=finetuned_from,
            origin=finetuned_from and f"Fine-tuned from [{finetuned_from}](https://huggingface.co/{finetuned_from}).",
            pipeline_tag=next(iter(_as_list(tasks)), None),
            dataset_ids=ids or None,
            dataset=", ".join(names) or None,
            dataset_notes=notes,
        )
        card = render(facts)
        if problems := problems_of(card):
            raise ValueError("The model card would be refused:\n" + "\n".join(f"- {problem}" for problem in problems))
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failures(getattr(self, "push_in_progress", None))  # absent until the repository was made

    def _warn_of_failures(self, push: Any) -> None:
        """Says once of each upload in the background that failed; the base drops their errors."""
        for job in [] if push is None else list(push.jobs):
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                push.jobs.remove(job)
                logger.warning(
                    "An upload during training failed: %s\n%s\nTraining goes on, and nothing in %s is lost; "
                    "`trainer.push_to_hub()` uploads the model at the end.",
                    error,
                    explain(error, self.hub_model_id),
                    self.args.output_dir,
                )

    @contextmanager
    def _veiled_args(self) -> Iterator[None]:
        """For as long as this lasts, ``self.args`` pickles without secrets and local paths."""
        own, self.args = self.args, veiled(self.args)
        try:
            yield
        finally:
            self.args = own

    @contextmanager
    def _explaining(self, *errors: type[Exception]) -> Iterator[None]:
        """Notes on an error of an upload what to do."""
        try:
            yield
        except errors as error:
            note = explain(error, getattr(self, "hub_model_id", None) or getattr(self.args, "hub_model_id", None))
            error.add_note(f"{note} Nothing in {self.args.output_dir} is lost.")
            raise


class _BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint again when training is resumed.

    A state that was pushed knows its step and not its folder, and a folder that was moved is elsewhere.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks for it beside the other checkpoints."""
        folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        known = state.best_model_checkpoint is not None and Path(state.best_model_checkpoint).is_dir()
        if state.best_global_step is not None and not known and folder.is_dir():
            state.best_model_checkpoint = str(folder)


def _hide_best_checkpoint(file: Path) -> None:
    state = json.loads(file.read_text(encoding="utf-8"))
    if state["best_model_checkpoint"] is not None:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        written = file.with_suffix(".tmp")  # the state marks the checkpoint whole: it must never be half-written
        written.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(file)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
