"""What two ranks train with the methods that ask the batch for more than two gradients, and one process too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from methods_by_name import options
from rank_worker import Outcome
from rank_worker_training import trained
from training import image_rows, vit

from hf_sage.methods import METHODS, Method


def case(name: str, _: Path | None = None, *, n: int = 1) -> Outcome:
    return trained(vit, image_rows, n=n, **options(name))


def asks_for_more(method: Method) -> bool:
    """Than SAM and SAGE, which have tests of their own."""
    tied = [rule for rule in (method.objective, method.hook, method.ascent) if rule is not None]
    return bool(method.needs - {"groups"} or any("groups" in rule.needs for rule in tied) or method.passes > 2)


CASES = {name: partial(case, name) for name in METHODS if asks_for_more(METHODS[name]())}
for name in METHODS:
    if "features" in METHODS[name]().needs:  # which meet in one place, from all micro-batches of one row a group
        CASES[f"{name}, 2 micro-batches"] = partial(case, name, n=2)
