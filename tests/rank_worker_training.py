"""What two ranks train, and one process too: the same global batches, cut over as many ranks as there are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from rank_worker import Outcome
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training import (
    CLASSES,
    DOMAINS,
    SAGE,
    Rows,
    accuracy,
    build,
    clip,
    entries,
    flat,
    hub_dataset,
    image_rows,
    language_model,
    resnet,
    text_rows,
    train,
    vit,
)
from transformers import TrainerCallback, set_seed

from hf_sage import SAGETrainer

BATCH = 12
METHODS = {"erm": {"method": "erm"}, "sam": {"method": "sam"}, "sage": SAGE}
AS_THEY_COME = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}

APART = "ppppppaaaaaa" + "ppaasspppaaa" + "ppppppppaaaa"
"""Domains of three batches. Of the first each rank has one; the sketches of the second are all on one rank; the third
has none at all."""


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# ---- Models and data that are made for ranks ----


class Experts(nn.Module):
    """A head for each expert, of which a row uses one; the last is used by none."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.trunk = nn.Linear(3 * 16 * 16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, CLASSES) for _ in range(3))

    def forward(self, pixel_values: Tensor, expert: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.trunk(pixel_values.flatten(1)).tanh()
        logits = torch.stack([self.heads[i](row) for i, row in zip(expert.tolist(), hidden, strict=True)])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows_apart() -> list[dict[str, Any]]:
    return image_rows(len(APART), domains=APART)


def rows_without_labels() -> list[dict[str, Any]]:
    """Of the second batch, one rank's half has nothing to learn from."""
    return text_rows()[:BATCH] + text_rows(unlabelled=BATCH // 2)[:BATCH]


def rows_of_experts() -> list[dict[str, Any]]:
    """The first half of a batch, one rank's, is the first expert's; the other half the second's."""
    return [row | {"expert": int(i % BATCH >= BATCH // 2)} for i, row in enumerate(image_rows())]


# ---- What is trained ----

TRAINED: dict[str, dict[str, Any]] = {}
"""Trainings that are the same on any number of ranks."""

PROBLEMS = {"clip": (clip, image_rows), "vit": (vit, image_rows), "language model": (language_model, text_rows)}
for (problem, (model, rows)), method, n in product(PROBLEMS.items(), METHODS, (1, 2)):
    TRAINED[f"{problem}, {method}, {n}"] = {"model": model, "rows": rows, "n": n} | METHODS[method]
for method, n in product(("sam", "sage"), (1, 2)):
    options = {"n": n} | AS_THEY_COME | METHODS[method]
    TRAINED[f"domains apart, {method}, {n}"] = {"model": clip, "rows": rows_apart} | options
    TRAINED[f"unused parameters, {method}, {n}"] = {"model": Experts, "rows": rows_of_experts} | options
    TRAINED[f"no labels, {method}, {n}"] = {"model": language_model, "rows": rows_without_labels} | options
    TRAINED[f"stream, {method}, {n}"] = {"model": clip, "rows": image_rows, "stream": True} | options
    TRAINED[f"no radius, {method}, {n}"] = {"model": clip, "rows": image_rows} | options | {"rho": 0.0}


def options_of(n: int = 1, **options: Any) -> dict[str, Any]:
    """Options of a training whose global batch is `BATCH` rows in ``n`` micro-batches a rank."""
    size = {"per_device_train_batch_size": BATCH // (ranks() * n), "gradient_accumulation_steps": n}
    return size | options


def trained(
    model: Callable[[], nn.Module],
    rows: Callable[[], Sequence[Mapping[str, Any]]],
    *,
    n: int = 1,
    stream: bool = False,
    **options: Any,
) -> Outcome:
    data = hub_dataset(rows()).to_iterable_dataset() if stream else Rows(rows())
    bits = Bits()
    trainer = train(model(), data, callbacks=[bits], **options_of(n, **options))
    return {"weights": flat(trainer.model), "bits": bits.seen, "log": entries(trainer)}


class Bits(TrainerCallback):
    """Notes a digest of all parameters after every step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(digest(kwargs["model"].parameters()))


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


# ---- Cases of their own ----


LOCAL = {"sam": {"method": "sam"}, "sage": SAGE | {"gamma": 0.0}}


def one_step(method: dict[str, Any], rows: Sequence[Mapping[str, Any]], size: int) -> Outcome:
    """One update by SGD at learning rate 1: the weights move by the gradient."""
    options = {"max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0, "per_device_train_batch_size": size}
    return trained(vit, lambda: rows, perturbation_scope="local", **AS_THEY_COME, **options, **method)


class Watched(SAGETrainer):
    """Notes a digest of the running statistics that each update starts from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.statistics: list[str] = []

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training and len(self.statistics) == self.state.global_step:
            self.statistics.append(digest(self.model.buffers()))
        return super().compute_loss(model, *args, **kwargs)


def batch_norm(scope: str, method: dict[str, Any], _: Path) -> Outcome:
    bits = Bits()
    options = options_of(2, trainer=Watched, callbacks=[bits], perturbation_scope=scope) | method
    trainer = train(resnet(), Rows(image_rows()), **options)
    return {"bits": bits.seen, "statistics": trainer.statistics, "at the end": digest(trainer.model.buffers())}


def resumed(folder: Path) -> Outcome:
    """7 updates of which 2 make an epoch: the checkpoint of the third is in the middle of the second."""
    options = {"n": 2, "max_steps": 7, "optim": "adamw_torch", "output_dir": str(folder)} | SAGE
    model = partial(clip, dropout=0.2)
    whole = trained(model, image_rows, save_strategy="steps", save_steps=3, **options)
    again = trained(model, image_rows, resume=str(folder / "checkpoint-3"), **options)
    return {"whole": whole, "again": again}


class Listening(SAGETrainer):
    """Notes the noise of each step, in units of its scale."""

    def finish_step(self) -> None:
        before = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        super().finish_step()
        after = [p.grad for p in self.model.parameters() if p.grad is not None]
        noise = torch.cat([(a - b).reshape(-1) for a, b in zip(after, before, strict=True)])
        self.noise = [*getattr(self, "noise", []), noise]


def noise(_: Path) -> Outcome:
    """γ so large that the gradient is lost in it, and with it what rounding took from the noise."""
    options = options_of(trainer=Listening, max_grad_norm=1e-6, learning_rate=1e-6) | SAGE | {"gamma": 1.0}
    trainer = train(clip(), Rows(image_rows()), **options)
    return {"noise": trainer.noise, "scale": [entry["noise_scale"] for entry in entries(trainer)]}


def scores(prediction: Any) -> dict[str, float]:
    """Real numbers beside the accuracy, which few rows could move."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return accuracy(prediction) | {"score": float(logits[:, 0].mean()), "own_loss": float(logits[:, 1].mean())}


def evaluation(rows: int, updates: int, _: Path) -> Outcome:
    """In batches of 8; of 21 rows the last batch has 5, on two ranks 3 and 2."""
    options = {"compute_metrics": scores, "per_device_eval_batch_size": 8 // ranks(), "learning_rate": 1e-9}
    metrics = {}
    for name, model in (("clip", clip), ("vit", vit)):
        trainer = build(model(), Rows(image_rows()), **options_of(max_steps=1, **options))
        if updates:
            trainer.train()
        metrics |= {f"{name} {k}": v for k, v in trainer.evaluate(Rows(image_rows(rows, seed=2))).items()}
    times = ("runtime", "per_second", "preparation_time")
    return {"metrics": {key: value for key, value in metrics.items() if not key.endswith(times)}}


class BrokenOnOneRank(SAGETrainer):
    """In the second update the rows of the last rank have a loss that is not a number."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + (self.state.global_step == 1)
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 and rank() == ranks() - 1 else loss


def broken(scope: str, method: dict[str, Any], _: Path) -> Outcome:
    bits = Bits()
    options = options_of(trainer=BrokenOnOneRank, callbacks=[bits], perturbation_scope=scope) | method
    trainer = train(clip(), Rows(image_rows()), **options)
    return {"bits": bits.seen, "log": entries(trainer), "calls": trainer.calls}


def traffic(method: dict[str, Any], _: Path) -> Outcome:
    """What this rank sends in one update."""
    trainer = build(clip(), Rows(image_rows()), **options_of(max_steps=1, **method))
    sent = Sent(trainer)
    trainer.add_callback(sent)
    trainer.train()
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {"sent": sent.bytes, "gradient": size, "groups": len(set(DOMAINS))}


class Sent(TrainerCallback):
    """Counts the bytes that a rank sends from the start of a step to its end, as W ranks in a ring do.

    Each sends (W−1)/W of what is reduced and scattered, or gathered; twice that of what is reduced to all.
    """

    ROUNDS: ClassVar = {
        "all_reduce": 2,
        "reduce_scatter_single": 1,  # names of torch 2.13 and, below, of the releases before
        "all_gather_single": 1,
        "reduce_scatter_tensor": 1,
        "all_gather_into_tensor": 1,
        "broadcast": 1,
    }

    def __init__(self, trainer: SAGETrainer) -> None:
        self.trainer = trainer
        self.bytes = 0.0
        self.collectives = {name: getattr(dist, name) for name in self.ROUNDS if hasattr(dist, name)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # DistributedDataParallel's own reduction does not pass through Python otherwise.
        self.trainer.model_wrapped.register_comm_hook(None, allreduce_hook)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, collective in self.collectives.items():
            setattr(dist, name, partial(self.counted, self.ROUNDS[name], collective))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, collective in self.collectives.items():
            setattr(dist, name, collective)

    def counted(self, rounds: int, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        largest = max(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        self.bytes += rounds * largest * (ranks() - 1) / ranks()
        return collective(*tensors, **options)


CASES: dict[str, Callable[[Path], Outcome]] = {
    **{name: partial(lambda options, _: trained(**options), options) for name, options in TRAINED.items()},
    **{
        f"one local step, {name}": lambda _, method=method: one_step(method, image_rows(BATCH), BATCH // ranks())
        for name, method in LOCAL.items()
    },
    "local": lambda _: trained(clip, image_rows, n=2, perturbation_scope="local", **SAGE),
    **{
        f"{name}, {scope}, {method}": partial(case, scope, METHODS[method])
        for name, case in (("batch norm", batch_norm), ("broken", broken))
        for scope in ("global", "local")
        for method in ("sam", "sage")
    },
    "resumed": resumed,
    "noise": noise,
    "evaluation, uneven": partial(evaluation, 21, 0),
    "evaluation, even": partial(evaluation, 24, 1),
    "evaluation, even, untrained": partial(evaluation, 24, 0),
    **{f"traffic, {name}": partial(traffic, method) for name, method in METHODS.items()},
    "traffic, local": partial(traffic, SAGE | {"perturbation_scope": "local"}),
}
