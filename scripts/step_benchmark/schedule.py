"""Section ``schedule``: SAGE with `ascent_interval`, which perturbs in some steps only, as users run it."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hf_sage import SAGEConfig, SAGETrainer
from step_benchmark.steps import GROUPS, ROWS
from step_benchmark.table import Row
from step_benchmark.timing import clock_of, interleaved
from step_benchmark.workload import Setting, Workload

FIELD = "ascent_interval"
"""The field of `SAGEConfig`; where there is none, there is no row."""

INTERVAL = 5
"""Steps from one perturbed pass to the next, and steps that are timed."""


def schedule(setting: Setting) -> list[Row]:
    """Compares a whole interval of SAGE steps to as many ERM steps, both by `SAGETrainer` with AdamW.

    Whether the accuracy stays is for `hf-sage demo` to say.
    """
    if FIELD not in {f.name for f in fields(SAGEConfig)}:
        return []
    tower, rows = setting.tower("vit_b_16"), setting.rows(ROWS)
    work = Workload(setting, tower, GROUPS, rows)
    images = Images(work)
    with TemporaryDirectory() as folder:
        options: dict[str, dict[str, Any]] = {"SAGE": {"method": "sage", FIELD: INTERVAL}, "ERM": {"method": "erm"}}
        phases = {name: [partial(_train, setting, work, images, folder, own)] for name, own in options.items()}
        times = interleaved(phases, clock_of(setting.device), setting.repetitions, setting.seed)
    return [
        Row.of_ratio(
            "schedule",
            f"SAGE steps with {FIELD}={INTERVAL} ÷ ERM steps",
            f"{tower}, K = {GROUPS} × {rows} images, {INTERVAL} steps of the trainer",
            times.ratio("SAGE", "ERM"),
            at_most=1.35,
            details={"seconds": {name: times.total(name) for name in phases}},
        )
    ]


class Images(Dataset[dict[str, Tensor | int]]):
    """The rows of a workload, with their groups as domains."""

    def __init__(self, work: Workload) -> None:
        self._pixels, self._labels = work.images.cpu(), work.labels.cpu()
        self._rows = len(self._labels) // work.groups

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"pixel_values": self._pixels[index], "labels": self._labels[index], "domain": index // self._rows}


def _train(setting: Setting, work: Workload, images: Images, folder: str, options: dict[str, Any]) -> None:
    config = SAGEConfig(
        folder,
        max_steps=INTERVAL,
        per_device_train_batch_size=len(images),
        learning_rate=1e-6,
        bf16=setting.dtype == "bf16",
        torch_compile=setting.compile,
        use_cpu=setting.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    SAGETrainer(model=work.network, args=config, train_dataset=images).train()
