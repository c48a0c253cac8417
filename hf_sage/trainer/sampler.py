"""Every batch holds an equal share of every domain, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class DomainBalancedSampler(Sampler[int]):
    """Row indices in the flat order d₀ d₁ … d_K₋₁ d₀ d₁ …, in whole global batches.

    Any run of consecutive indices holds the domains in equal numbers, give or take one, so the batches stay balanced
    however they are cut over ranks and accumulation steps:

        rows        d0 d1 d2 d0 d1 d2 | d0 d1 d2 d0 d1 d2 | ...
        2 ranks     └─ rank 0 ─┘ └─ rank 1 ─┘
        1 rank      └───── micro-batch ─────┘

    Each domain is an endless stream: a shuffle of its rows, then another shuffle, and so on. An epoch is a window on
    the streams, as long as the data in whole global batches (at least one), and the next epoch goes on where it ended.
    So within a domain no row comes a second time before every other came once; a small domain is repeated and a large
    one seen in part in each epoch. The order is a function of seed and epoch alone: nothing is to be saved for a
    restart, and no rank has to be told.

    Args:
        domains: The domain of every row; any hashable values.
        batch_size: Rows of one update over all ranks and accumulation steps.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If the batch has fewer rows than there are domains.
    """

    def __init__(self, domains: Sequence[object], batch_size: int, seed: int = 0) -> None:
        rows: dict[object, list[int]] = {}
        for i, domain in enumerate(domains):  # first come, first: renaming the domains changes nothing
            rows.setdefault(domain, []).append(i)
        if batch_size < len(rows):
            raise ValueError(
                f"A batch of {batch_size} rows cannot hold one of each of {len(rows)} domains. Raise "
                f"per_device_train_batch_size or gradient_accumulation_steps until their product over all processes is "
                f'at least {len(rows)}, or use domain_sampling="natural".'
            )
        self._rows = [torch.tensor(r) for r in rows.values()]
        self._length = max(1, len(domains) // batch_size) * batch_size if len(domains) else 0
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Moves the window: called by the trainer at the start of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return self.rows(self._epoch * self._length, self._length)

    def rows(self, start: int, count: int) -> Iterator[int]:
        """The rows at so many positions of the endless flat order, from position ``start`` on."""
        k = len(self._rows)
        streams = [self._stream(d, first=-((d - start) // k)) for d in range(k)]
        return (next(streams[position % k]) for position in range(start, start + count))

    def _stream(self, domain: int, first: int) -> Iterator[int]:
        """The endless stream of a domain's rows from position ``first`` on."""
        rows = self._rows[domain]
        shuffle, offset = divmod(first, len(rows))
        while True:
            # One generator a shuffle; the multipliers keep neighbouring seeds, domains and shuffles apart.
            seed = (self._seed * 1_000_003 + domain) * 1_000_033 + shuffle
            generator = torch.Generator().manual_seed(seed % 2**63)
            yield from rows[torch.randperm(len(rows), generator=generator)[offset:]].tolist()
            shuffle, offset = shuffle + 1, 0
