"""Random numbers of a batch that a restart draws again."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from hf_sage.engine.randomness import step_seed


class BatchDraws:
    """A generator for every batch of a training: a function of the run's seed and the batch's place in it.

    transformers saves torch's state with a batch after the checkpoint already drawn for, so that augmentations from it
    come out differently after a restart in the middle of an epoch. These do not, with any number of workers, if
    `hf_sage.data.callback.DrawsCallback` is among the trainer's callbacks and the training's collator is not used for
    evaluation. Streams are skipped by reading them, and are drawn for anew.

    Without that callback the draws are from torch's default generator: that of the process, or of the worker.
    """

    def __init__(self) -> None:
        # Epochs begun, seed, updates done before this epoch, micro-batches an update, rank; in shared memory, because
        # persistent workers outlive an epoch.
        self._epoch = torch.zeros(5, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._begun = 0
        self._batches = 0

    def begin_epoch(self, seed: int, updates: int, micro_batches: int, rank: int = 0) -> None:
        """Starts to count batches anew.

        Args:
            seed: The run's seed.
            updates: Updates done so far.
            micro_batches: Batches of one update on this rank.
            rank: This process among those of the training.
        """
        self._epoch.copy_(torch.tensor([int(self._epoch[0]) + 1, seed, updates, micro_batches, rank]))

    def next(self) -> torch.Generator:
        """The generator of the next batch."""
        begun, seed, updates, micro_batches, rank = self._epoch.tolist()
        if not begun:
            return torch.default_generator
        if begun != self._begun:
            self._begun, self._batches = begun, 0
        worker = get_worker_info()  # the batches of an epoch are dealt to the workers in turn
        batch = self._batches if worker is None else self._batches * worker.num_workers + worker.id
        self._batches += 1
        update, micro_batch = divmod(batch, micro_batches)
        own = step_seed(step_seed(step_seed(seed, updates + update), micro_batch), rank)
        return torch.Generator().manual_seed(own)
