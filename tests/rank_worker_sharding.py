"""What two ranks compute with a network that FSDP2 has sharded, and one process without it: in plain torch, fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from problems import Batch, batch, matrix, part, values, watched
from rank_worker import Outcome
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_sage.agreement import gram_matrix
from hf_sage.ascents import Ascent
from hf_sage.engine import Part, Step, StepReport, descend, two_pass_step
from hf_sage.engine.sharding import MeanByFSDP
from hf_sage.methods import Method, erm, sage, sam
from hf_sage.vectors import whole

METHODS = {
    "sage": sage(0.05, 0.3, polar="svd"),
    "sage, relative biases": sage(0.05, 0.3, bias_radius="norm"),
    "sam": sam(0.05),
    "erm": erm(),
}
SIZES = {"photo": 5, "sketch": 3, "art": 1}
"""The second rank has no row of the last group."""

SEED = 11


class Gain(nn.Module):
    """A vector of one entry: one rank has it, the other nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def network() -> nn.Module:
    """Rows that two ranks share evenly, unevenly, and one to none."""
    torch.manual_seed(0)
    head = [nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False), nn.Linear(1, 3)]
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), *head, Gain()).double()


# ---- Sharding ----


def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


def by_layer(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def columns(p: Tensor) -> Shard | None:
    """The second dimension where both ranks get as much of it."""
    return Shard(1) if p.dim() > 1 and p.shape[1] % 2 == 0 else None


def never_resharded(model: nn.Module) -> nn.Module:
    """As accumulation over micro-batches may want it: whole from the first forward pass on."""
    by_layer(model, mesh=mesh(2), reshard_after_forward=False).set_reshard_after_backward(False)
    return model


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "whole model": lambda model: fully_shard(model, mesh=mesh(2)),
    "by layer": lambda model: by_layer(model, mesh=mesh(2)),
    "whole between the passes": lambda model: by_layer(model, mesh=mesh(2), reshard_after_forward=False),
    "columns": lambda model: by_layer(model, mesh=mesh(2), shard_placement_fn=columns),
    "two replicas": lambda model: by_layer(model, mesh=mesh(2, 1)),
}


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def parts_of(model: nn.Module, data: Batch, groups: Sequence[str] = tuple(SIZES)) -> list[Part]:
    """Every W-th row, by group, and a part of weight 0 where that is none; FSDP averages over ranks."""
    parts = []
    for group in groups:
        rows = [i for i in data.rows(group) if i % ranks() == rank()]
        weight = ranks() * len(rows) / len(data.groups)
        rows = rows or [0]
        parts.append(part(model, group, data.x[rows], data.y[rows], weight))
    return parts


def locals_of(model: nn.Module) -> list[Tensor]:
    """A copy of what this rank holds of the parameters."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in values(model)]


def sum_of_ranks(x: Tensor) -> Tensor:
    x = x.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def facts(report: StepReport) -> dict[str, Tensor]:
    """Of the whole batch."""
    found = {"agreement": report.agreement, "loss": sum_of_ranks(report.loss) / ranks()}
    if report.perturbed_loss is not None:
        found["perturbed_loss"] = sum_of_ranks(report.perturbed_loss) / ranks()
        found["perturbation_norm"] = report.perturbation_norm
    for group, (loss, _) in report.group_losses.items():
        found[f"loss/{group}"] = sum_of_ranks(loss) / ranks()
    return found


# ---- Cases ----


def trained(layout: Callable[[nn.Module], nn.Module], method: Method) -> Outcome:
    """Three updates, as a loop of one's own makes them; an evaluation before each leaves FSDP with whole parameters."""
    model, found = layout(network()), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        data = batch(sizes=SIZES, seed=step)
        with torch.no_grad():
            model(data.x)
        optimizer.zero_grad()
        report = two_pass_step(model, parts_of(model, data), method)
        gradient = [whole(p.grad).clone() for p in model.parameters()]
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        said = descend(model, method, report, Step(seed=SEED + step))
        noisy = [whole(p.grad).clone() for p in model.parameters()]
        optimizer.step()
        theta = [whole(p.detach()).clone() for p in model.parameters()]
        found.append({"gradient": gradient, "noisy": noisy, "theta": theta, "facts": facts(report) | said})
    return {"steps": found}


def noise(layout: Callable[[nn.Module], nn.Module], method: Method) -> Outcome:
    """Added to a gradient of zero: S = 0, so β = γ."""
    model = layout(network())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    nothing = torch.zeros((), dtype=torch.float64)
    descend(model, method, StepReport(nothing, None, nothing, None, {}, True), Step(seed=SEED))
    return {"noise": [whole(p.grad) for p in model.parameters()]}


class Watching(Ascent):
    """An ascent that notes what it was given, what it gave, and what travelled meanwhile."""

    def __init__(self, method: Method) -> None:
        self.ascent, self.rho, self.found = method.ascent, method.ascent.rho, {}

    def __call__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Any = None) -> list[Tensor]:
        with CommDebugMode() as travelled:
            epsilon = self.ascent(parameters, gradients)
        held = [e.to_local() if isinstance(e, DTensor) else e for e in epsilon]
        counts = {str(kind).rpartition(".")[2]: n for kind, n in travelled.get_comm_counts().items()}
        self.found = {
            "epsilon": [whole(e).clone() for e in epsilon],  # the step keeps θ in its memory
            "kept": [(e.numel() * e.element_size(), e.untyped_storage().nbytes()) for e in held],
            "gathered": counts.get("all_gather_into_tensor", 0),
            "matrices": sum(g.dim() > 1 for g in gradients),
        }
        return epsilon


def ascent(layout: Callable[[nn.Module], nn.Module], method: Method) -> Outcome:
    model, watching = layout(network()), Watching(method)
    before = locals_of(model)
    two_pass_step(model, parts_of(model, batch(sizes=SIZES)), replace(method, ascent=watching))
    return watching.found | {"before": before, "after": locals_of(model)}


def raised(layout: Callable[[nn.Module], nn.Module], method: Method) -> Outcome:
    """The second pass raises on both ranks, with the perturbed parameters of the outermost module whole."""
    model, data = layout(network()), batch(sizes=SIZES)
    before = locals_of(model)

    def fail_late(*_: object) -> None:
        if len(seen) > len(SIZES) + 1:
            raise KeyboardInterrupt

    with watched(model) as seen, suppress(KeyboardInterrupt):
        handle = model.register_forward_hook(fail_late)
        two_pass_step(model, parts_of(model, data), method)
    handle.remove()
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    after = locals_of(model)
    two_pass_step(model, parts_of(model, data), method)
    gradient = [whole(p.grad) for p in model.parameters()]
    return {"passes": len(seen), "sharded": sharded, "before": before, "after": after, "gradient": gradient}


def gram(_: Path) -> Outcome:
    """Of tensors laid out in different ways, as tensor parallelism makes them; the last is cut by both dimensions."""
    layouts = [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
    groups = [[matrix(4, 3, seed=10 * k + i) for i in range(len(layouts))] for k in range(3)]
    cut = mesh(2, 1)
    pieces = [[distribute_tensor(g, cut, layout) for g, layout in zip(own, layouts, strict=True)] for own in groups]
    return {"found": MeanByFSDP().gram(pieces), "expected": gram_matrix(groups)}


def broken(_: Path) -> Outcome:
    """A loss of the last rank is not a number."""
    model = LAYOUTS["by layer"](network())
    parts = parts_of(model, batch(sizes=SIZES))
    if rank() == ranks() - 1:
        sound = parts[0].loss
        parts[0] = replace(parts[0], loss=lambda: sound() * torch.nan)
    with watched(model) as seen:
        report = two_pass_step(model, parts, METHODS["sage"])
    return {"is_finite": report.is_finite, "passes": len(seen), "groups": len(parts)}


def refused(prepare: Callable[[], tuple[nn.Module, list[Part]]], _: Path) -> Outcome:
    model, parts = prepare()
    try:
        two_pass_step(model, parts, METHODS["sage"])
    except ValueError as error:
        return {"message": str(error)}
    return {"message": ""}


def different_groups() -> tuple[nn.Module, list[Part]]:
    model = LAYOUTS["by layer"](network())
    return model, parts_of(model, batch(sizes=SIZES), ("photo", "art")[: 1 + rank()])


def partly_sharded() -> tuple[nn.Module, list[Part]]:
    model = network()
    fully_shard(model[0], mesh=mesh(2))
    return model, parts_of(model, batch(sizes=SIZES))


ALIKE = {
    "trained": (trained, METHODS),
    "noise": (noise, ["sage"]),
    "ascent": (ascent, ["sage", "sam"]),
    "raised": (raised, ["sage", "sam"]),
}
"""Cases that are the same in one process, with any layout."""

CASES: dict[str, Callable[[Path], Outcome]] = {
    f"{name}, {layout}, {method}": lambda _, case=case, layout=layout, method=method: case(
        LAYOUTS[layout], METHODS[method]
    )
    for name, (case, methods) in ALIKE.items()
    for layout, method in product(LAYOUTS, methods)
} | {
    **{
        f"trained, never resharded, {name}": lambda _, method=METHODS[name]: trained(never_resharded, method)
        for name in ("sage", "sam")
    },
    "gram": gram,
    "broken": broken,
    "different groups": partial(refused, different_groups),
    "partly sharded": partial(refused, partly_sharded),
}
