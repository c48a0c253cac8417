"""Section ``polar``: the polar factor of every matrix of the network, in time and in quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from hf_sage.polar import PRESETS, polar_factor
from step_benchmark.baselines import muon_newton_schulz
from step_benchmark.table import Row
from step_benchmark.timing import clock_of, interleaved
from step_benchmark.workload import CLASSES, TOWERS, Setting

LOOP = "loop of five quintic steps"
DEFAULT = "auto"
SPECTRA = ("1/i", "Gaussian")

Shape = tuple[int, int]

FACTORS: dict[str, Callable[[Tensor], Tensor]] = {LOOP: muon_newton_schulz}
FACTORS |= {f'polar="{preset}"': partial(polar_factor, preset=preset) for preset in PRESETS}
"""Everything that is compared, by name."""

UNTIMED = ('polar="svd"',)
"""The yardstick of quality, several times slower than the loop."""


@dataclass(frozen=True)
class Example:
    """A matrix of known singular vectors.

    Attributes:
        matrix: G, of shape (m, n), in fp32.
        left: U, of shape (m, r) for rank r, in fp64.
        right: V, of shape (n, r), in fp64.
    """

    matrix: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def draw(cls, shape: Shape, spectrum: str, rank: int | None, device: torch.device) -> Example:
        """Singular values 1/i or a Gaussian matrix's, singular vectors uniform: for the latter, a Gaussian matrix."""
        r = min(rank or max(shape), *shape)
        drawn = [torch.randn(*sides, dtype=torch.float64, device=device) for sides in ((shape[0], r), (shape[1], r))]
        left, right = (torch.linalg.qr(x).Q for x in drawn)
        if spectrum == "1/i":
            values = 1 / torch.arange(1, r + 1, dtype=torch.float64, device=device)
        else:
            values = torch.linalg.svdvals(torch.randn(*shape, dtype=torch.float64, device=device))[:r]
        return cls(((left * values) @ right.mT).float(), left, right)

    def cosine(self, factor: Tensor) -> float:
        """Frobenius cosine of a factor with UVᵀ."""
        x = factor.double()
        inner = ((self.left.mT @ x) * self.right.mT).sum()
        return float(inner / x.norm() / self.left.shape[1] ** 0.5)

    def null_size(self, factor: Tensor) -> float:
        """Largest singular value of a factor on the directions that the matrix does not have."""
        x = factor.double()
        x = x - self.left @ (self.left.mT @ x)
        x = x - (x @ self.right) @ self.right.mT
        return float(torch.linalg.matrix_norm(x, ord=2))


def polar(setting: Setting) -> list[Row]:
    """Compares every preset over all matrices of the network to the loop of ``torch.optim.Muon``, five quintic steps.

    The loop takes one matrix at a time, in fp32; on a GPU a preset takes those of one shape as a stack, as the ascent
    does. Matrices have the shapes of the network's parameters and singular
    values 1/i or those of Gaussian matrices. Quality is that of one matrix of each shape: the mean cosine to UVᵀ over
    the network's matrices, and the largest singular value that a direction without a gradient is given, at the rank
    that a classifier's head has.
    """
    torch.manual_seed(setting.seed)
    tower = setting.tower("vit_b_16")
    shapes: list[Shape] = [(len(p), p[0].numel()) for p in TOWERS[tower].build().parameters() if p.dim() >= 2]
    config = f"{len(shapes)} matrices of {tower}"
    rows = []
    for spectrum in SPECTRA:
        examples = {shape: Example.draw(shape, spectrum, None, setting.device) for shape in set(shapes)}
        matrices = [_shuffled(examples[shape].matrix) for shape in shapes]
        rows += _times(matrices, f"{config}, {spectrum}", setting)
        rows += _cosines([examples[shape] for shape in shapes], f"{config}, {spectrum}", setting)
    low_rank = [Example.draw(shape, "1/i", CLASSES - 1, setting.device) for shape in set(shapes)]
    return rows + _null_sizes(low_rank, f"{config}, 1/i at rank {CLASSES - 1}")


def _times(matrices: Sequence[Tensor], config: str, setting: Setting) -> list[Row]:
    timed = [name for name in FACTORS if name not in UNTIMED]
    on_gpu = setting.device.type == "cuda"
    contestants = {
        name: [partial(_all_factors, FACTORS[name], matrices, in_stacks=on_gpu and name != LOOP)] for name in timed
    }
    times = interleaved(contestants, clock_of(setting.device), setting.repetitions, setting.seed)
    return [
        Row.of_ratio(
            "polar",
            f"`{name}` ÷ {LOOP}",
            config,
            times.ratio(name, LOOP),
            at_most=0.4 if _is_default(name) else None,
            details={"seconds": {key: times.total(key) for key in (name, LOOP)}},
        )
        for name in timed
        if name != LOOP
    ]


def _cosines(examples: Sequence[Example], config: str, setting: Setting) -> list[Row]:
    rows = []
    for name, factor in FACTORS.items():
        found = {id(e): e.cosine(factor(e.matrix)) for e in {id(e): e for e in examples}.values()}
        measured = mean(found[id(e)] for e in examples)
        bound = (0.99 if setting.device.type == "cuda" else 0.999) if _is_default(name) else None
        details = {"worst": min(found.values())}
        rows.append(Row("polar", f"cosine to UVᵀ, {_code(name)}", config, measured, at_least=bound, details=details))
    return rows


def _null_sizes(examples: Sequence[Example], config: str) -> list[Row]:
    rows = []
    for name, factor in FACTORS.items():
        measured = max(e.null_size(factor(e.matrix)) for e in examples)
        bound = 1e-3 if _is_default(name) else None
        rows.append(Row("polar", f"largest null direction, {_code(name)}", config, measured, at_most=bound))
    return rows


def _all_factors(factor: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], *, in_stacks: bool) -> None:
    if not in_stacks:
        for matrix in matrices:
            factor(matrix)
        return
    for shape in {matrix.shape for matrix in matrices}:
        factor(torch.stack([matrix for matrix in matrices if matrix.shape == shape]))


def _shuffled(matrix: Tensor) -> Tensor:
    """Another matrix of the same singular values."""
    m, n = matrix.shape
    return matrix[torch.randperm(m)][:, torch.randperm(n)].contiguous()


def _is_default(name: str) -> bool:
    return name == f'polar="{DEFAULT}"'


def _code(name: str) -> str:
    return name if name == LOOP else f"`{name}`"
