"""Sections ``clean_pass`` and ``memory``: what the groups' gradients cost beside a plain forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from step_benchmark.baselines import erm_pass
from step_benchmark.memory import peak_of
from step_benchmark.table import Row
from step_benchmark.timing import clock_of, interleaved
from step_benchmark.workload import Setting, Workload

from hf_sage.engine import clean_pass as k_passes

Pass = Callable[[Workload], object]

ENGINES: dict[str, Pass] = {
    "a pass for each group": lambda work: k_passes(work.parameters, work.parts(), torch.Tensor.backward),
}
"""How the library computes the clean pass, by name; the last is its default."""

REACH = {3: 1.08, 6: 1.12}
"""The ratio to ERM to stay below, by number of groups."""


def clean_pass(setting: Setting) -> list[Row]:
    """Compares the clean pass (mean gradient, agreement) to forward and backward over the same images in one batch.

    TorchJD's ``autogram.Engine`` gives the Gramian of the images' gradients, from which S follows too; its peer row is
    the forward pass, that Gramian and the backward pass of the mean loss.
    """
    rows = []
    for groups, bound in REACH.items():
        work, config = _workload(setting, groups)
        phases = {name: [partial(run, work), work.clear] for name, run in ({"ERM": erm_pass} | ENGINES).items()}
        if find_spec("torchjd") is not None:
            peer, _ = _workload(setting, groups)  # its own: TorchJD hooks the modules
            phases["TorchJD Gramian"] = [torchjd_pass(peer), peer.clear]
        times = interleaved(phases, clock_of(setting.device), setting.repetitions, setting.seed)
        default = list(ENGINES)[-1]
        rows += [
            Row.of_ratio(
                "clean_pass",
                f"clean pass ({name}) ÷ ERM forward + backward",
                config,
                times.ratio(name, "ERM", phase=0),
                at_most=bound if name == default else None,
                details={"seconds": {key: times.total(key, 0) for key in (name, "ERM")}},
            )
            for name in list(phases)[1:]
        ]
        if "TorchJD Gramian" not in phases:
            rows.append(Row("clean_pass", "TorchJD Gramian", config, None, note="left out: torchjd is not installed"))
    return rows


def memory(setting: Setting) -> list[Row]:
    """Compares the peak memory of the clean pass to that of ERM's forward and backward, in copies of the parameters.

    Activations come and go with the images. What the groups' gradients add is therefore the difference of the peaks
    without what autograd saves for the backward pass (on a GPU: of the allocator's peaks).
    """
    rows = []
    for name, run in ENGINES.items():
        is_default = name == list(ENGINES)[-1]
        for groups in REACH:
            work, config = _workload(setting, groups)
            erm = peak_of(partial(erm_pass, work), setting.device)
            work.clear()
            ours = peak_of(partial(run, work), setting.device)
            work.clear()
            total = (ours.total - erm.total) / work.parameter_bytes
            added = total
            note = "difference of the allocator's peaks"
            if ours.outside_graph is not None and erm.outside_graph is not None:
                added = (ours.outside_graph - erm.outside_graph) / work.parameter_bytes
                note = f"without activations; peaks with them differ by {total:+.2f} copies"
            rows.append(
                Row(
                    "memory",
                    f"copies of the parameters that the clean pass ({name}) adds to ERM's peak",
                    config,
                    added,
                    at_most=1.0 if is_default else None,
                    note=note,
                    details={"peaks": {"ERM": vars(erm), name: vars(ours)}, "parameters": work.parameter_bytes},
                )
            )
    return rows


def torchjd_pass(work: Workload) -> Callable[[], object]:
    """Forward, Gramian of the images' gradients by TorchJD, backward of the mean loss."""
    from torchjd.autogram import Engine

    engine = Engine(work.network, batch_dim=0)

    def run() -> None:
        losses = work.row_losses()
        engine.compute_gramian(losses)
        losses.mean().backward()

    return run


def _workload(setting: Setting, groups: int) -> tuple[Workload, str]:
    tower, rows = setting.tower("clip_384x6"), setting.rows(4)
    return Workload(setting, tower, groups, rows), f"{tower}, K = {groups} × {rows} images"
