"""Sections ``clean_pass`` and ``memory``: what the groups' gradients cost beside a plain forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from hf_sage.engine import clean_pass as group_by_group
from hf_sage.engine.gradients import gradient_of
from hf_sage.engine.joint import joint_clean_pass
from step_benchmark.baselines import erm_pass
from step_benchmark.memory import peak_of
from step_benchmark.table import Row
from step_benchmark.timing import Phases, clock_of, interleaved
from step_benchmark.workload import Setting, Workload

REACH = {3: 1.08, 6: 1.12}
"""The ratio to ERM to stay below, by number of groups."""

JOINT = "one pass for all groups"
K_PASSES = "a pass for each group"
PEER = "TorchJD's Gramian"


def clean_pass(setting: Setting) -> list[Row]:
    """Compares the clean pass (mean gradient and agreement) to forward and backward over the same images in one batch.

    TorchJD's ``autogram.Engine`` gives the Gramian of the single images' gradients, from which S follows too: its row
    is the forward pass, that Gramian and the backward pass of the mean loss.
    """
    rows = []
    for groups, bound in REACH.items():
        work, config = _workload(setting, groups)
        contestants: dict[str, Phases] = {
            name: [partial(run, work), work.clear]
            for name, run in (("ERM", erm_pass), (JOINT, _joint_pass), (K_PASSES, _k_passes))
        }
        if find_spec("torchjd") is not None:
            peer, _ = _workload(setting, groups)  # its own: TorchJD hooks the modules
            contestants[PEER] = [_torchjd_pass(peer), peer.clear]
        left_out = {} if PEER in contestants else {PEER: "left out: torchjd is not installed"}
        default = JOINT
        if obstacle := _obstacle(work):
            del contestants[JOINT]
            left_out[JOINT] = f"not possible here: {obstacle}"
            default = K_PASSES
        times = interleaved(contestants, clock_of(setting.device), setting.repetitions, setting.seed)
        for name in (JOINT, K_PASSES, PEER):
            what = f"clean pass ({name}) ÷ ERM forward + backward"
            if name in left_out:
                rows.append(Row("clean_pass", what, config, None, note=left_out[name]))
                continue
            target = {"at_most": bound} if name == default else {}
            details = {"seconds": {key: times.total(key, 0) for key in (name, "ERM")}}
            ratio = times.ratio(name, "ERM", phase=0)
            rows.append(Row.of_ratio("clean_pass", what, config, ratio, **target, details=details))
    return rows


def memory(setting: Setting) -> list[Row]:
    """Compares the peak memory of the clean pass to that of ERM fed the same way, in copies of the parameters.

    In one batch, or accumulated group by group where there is a pass for each. What ERM's pass takes, activations and
    gradient, is no cost of the groups. On a CPU the figure is the larger of two differences of peaks, that of all
    tensors alive and that without what autograd saves for the backward pass: activations would hide gradients kept
    from one pass to the next. On a GPU it is the difference of the allocator's peaks.
    """
    rows = []
    default = JOINT
    for name, ours, erm in ((JOINT, _joint_pass, erm_pass), (K_PASSES, _k_passes, _accumulated_erm_pass)):
        for groups in REACH:
            work, config = _workload(setting, groups)
            what = f"copies of the parameters that the clean pass ({name}) adds to ERM's peak"
            if name == JOINT and (obstacle := _obstacle(work)):
                rows.append(Row("memory", what, config, None, note=f"not possible here: {obstacle}"))
                default = K_PASSES
                continue
            peaks = {}
            for key, run in (("ERM", erm), (name, ours)):
                peaks[key] = peak_of(partial(run, work), setting.device)
                work.clear()
            added = [peaks[name].total - peaks["ERM"].total]
            note = "the allocator's peaks"
            if (a := peaks[name].outside_graph) is not None and (b := peaks["ERM"].outside_graph) is not None:
                added.append(a - b)
                note = "{:+.2f} with activations, {:+.2f} without".format(*(x / work.parameter_bytes for x in added))
            rows.append(
                Row(
                    "memory",
                    what,
                    config,
                    max(added) / work.parameter_bytes,
                    at_most=1.0 if name == default else None,
                    note=note,
                    details={"bytes": {key: vars(p) for key, p in peaks.items()}, "parameters": work.parameter_bytes},
                )
            )
    return rows


def _joint_pass(work: Workload) -> object:
    return joint_clean_pass(work.network, work.parameters, work.parts(), work.joint(), torch.Tensor.backward)


def _k_passes(work: Workload) -> object:
    return group_by_group(work.parameters, work.parts(), torch.Tensor.backward)


def _accumulated_erm_pass(work: Workload) -> object:
    return gradient_of(work.parameters, work.parts(), torch.Tensor.backward)


def _obstacle(work: Workload) -> str | None:
    """Why the groups cannot share a pass, if so; the engine's own trial is over after this."""
    _joint_pass(work)
    return work.verdict.obstacle


def _torchjd_pass(work: Workload) -> Callable[[], object]:
    engine = import_module("torchjd.autogram").Engine(work.network, batch_dim=0)

    def run() -> None:
        losses = work.row_losses()
        engine.compute_gramian(losses)
        torch.autograd.backward(losses.mean())

    return run


def _workload(setting: Setting, groups: int) -> tuple[Workload, str]:
    tower, rows = setting.tower("clip_384x6"), setting.rows(4)
    return Workload(setting, tower, groups, rows), f"{tower}, K = {groups} × {rows} images"
