"""What every test runs under: no network, one thread, a fixed seed."""

from __future__ import annotations

import gc
import os

# Before transformers and datasets are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the laws are stated for fp32 on CPU

import pytest
import torch

torch.set_num_threads(1)  # one process a core; and so from the first fixture on, or sums are rounded otherwise


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Each training ends with a garbage collection, three quarters of which went over the imported modules."""
    gc.collect()
    gc.freeze()
