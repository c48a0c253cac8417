"""Sections ``step`` and ``restore``: whole updates beside each other, and what putting θ back costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from hf_sage.engine import Step, descend, perturbed, two_pass_step
from hf_sage.methods import sage, sam
from step_benchmark.baselines import erm_pass, naive_sage_pass
from step_benchmark.memory import peak_of
from step_benchmark.table import Row
from step_benchmark.timing import Phases, clock_of, interleaved
from step_benchmark.workload import Setting, Workload

GROUPS = 3
ROWS = 12
RADIUS = 0.05
"""ρ of both SAMs; SAGE has its default. No time depends on either."""

INTERVAL = 5
"""`ascent_interval` of the cheaper schedule."""


def step(setting: Setting) -> list[Row]:
    """Compares whole updates: SAGE to SAM (two passes, L2), to SAGE as one would first write it, and to ERM.

    The same AdamW follows each. Gradients and optimizer are timed apart in one run, which gives the ratios with and
    without the optimizer. ``pytorch_optimizer``'s SAM is the two-pass step from outside.
    """
    tower, rows = setting.tower("vit_b_16"), setting.rows(ROWS)
    work = Workload(setting, tower, GROUPS, rows)
    optimizer = torch.optim.AdamW(work.parameters, lr=1e-6)
    passes: dict[str, Callable[[Workload], object]] = {
        "ERM": erm_pass,
        "SAM": _sam_pass,
        "SAGE": _sage_pass,
        "SAGE without its second pass": partial(_sage_pass, number=1),
        "naive SAGE": naive_sage_pass,
    }
    phases: dict[str, Phases] = {
        name: [partial(run, work), partial(_update, optimizer, work)] for name, run in passes.items()
    }
    if has_peer := find_spec("pytorch_optimizer") is not None:
        phases["pytorch_optimizer's SAM"] = _peer_sam(work)
    times = interleaved(phases, clock_of(setting.device), setting.repetitions, setting.seed)
    config = f"{tower}, K = {GROUPS} × {rows} images"
    to_sam = 1.05 if setting.device.type == "cuda" else 1.08
    targets = [("SAGE", "SAM", to_sam), ("SAGE", "naive SAGE", 0.65), ("SAGE", "ERM", None), ("SAM", "ERM", None)]
    table = []
    for over, under, bound in targets:
        seconds = {name: times.seconds[name] for name in (over, under)}
        for phase, suffix in ((None, ""), (0, ", without the optimizer")):
            table.append(
                Row.of_ratio(
                    "step",
                    f"{over} step ÷ {under} step{suffix}",
                    config,
                    times.ratio(over, under, phase),
                    at_most=bound if phase is None else None,
                    details={"seconds of gradients and optimizer": seconds},
                )
            )
    table.append(
        Row.of_ratio(
            "step",
            f"SAGE step with ascent_interval={INTERVAL} ÷ ERM step",
            config,
            times.mixed_ratio({"SAGE": 1, "SAGE without its second pass": INTERVAL - 1}, "ERM"),
            at_most=1.35,
            note=f"of {INTERVAL} steps one has a second pass",
        )
    )
    what = "SAGE step ÷ pytorch_optimizer's SAM step"
    if not has_peer:
        return [*table, Row("step", what, config, None, note="left out: pytorch_optimizer is not installed")]
    return [*table, Row.of_ratio("step", what, config, times.ratio("SAGE", "pytorch_optimizer's SAM"))]


def restore(setting: Setting) -> list[Row]:
    """Compares memory with θ perturbed to memory with θ and ε alone, and the bits of θ afterwards to those before."""
    tower = setting.tower("vit_b_16")
    work = Workload(setting, tower, groups=1, rows=1)
    theta = [p.detach() for p in work.parameters]
    before = [p.clone() for p in theta]
    epsilon = [1e-3 * torch.randn_like(p) for p in theta]
    moved = 0

    def there_and_back() -> None:
        nonlocal moved
        with perturbed(theta, epsilon):
            moved = _different(theta, before)

    peak = peak_of(there_and_back, setting.device)
    return [
        Row(
            "restore",
            "copies of the parameters that perturbing and restoring add to θ and ε",
            tower,
            peak.total / work.parameter_bytes,
            at_most=1.0,
            note="at the peak; the saved θ takes ε's memory",
            details={"bytes": peak.total, "parameters": work.parameter_bytes},
        ),
        Row(
            "restore",
            "parameters whose bits differ after restoring",
            tower,
            _different(theta, before),
            at_most=0,
            note=f"of {moved:,} that differed while perturbed",
        ),
    ]


def _sam_pass(work: Workload) -> None:
    two_pass_step(work.network, work.whole(), sam(RADIUS))


def _sage_pass(work: Workload, number: int = 0) -> None:
    """An update with a second pass where the number is a multiple of the interval."""
    method, now = replace(sage(), ascent_interval=INTERVAL), Step(number)
    report = two_pass_step(work.network, work.parts(), method, step=now, joint=work.joint())
    descend(work.network, method, report, now)


def _peer_sam(work: Workload) -> Phases:
    """The SAM of pytorch_optimizer around an AdamW; its second phase puts θ back too."""
    sam_class = import_module("pytorch_optimizer").SAM
    optimizer = sam_class(work.parameters, torch.optim.AdamW, rho=RADIUS, lr=1e-6)

    def gradients() -> None:
        erm_pass(work)
        optimizer.first_step(zero_grad=True)
        erm_pass(work)

    def update() -> None:
        optimizer.second_step()
        work.clear()

    return [gradients, update]


def _update(optimizer: torch.optim.Optimizer, work: Workload) -> None:
    optimizer.step()
    work.clear()


def _different(these: list[torch.Tensor], those: list[torch.Tensor]) -> int:
    """Number of entries that differ in their bits."""
    return sum(int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in zip(these, those, strict=True))
