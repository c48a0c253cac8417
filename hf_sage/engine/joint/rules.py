"""By which functions of torch parameters meet rows, and what takes their place while a pass is joint.

A rule has the signature of the function it stands for, behind the pass. It returns ``None`` where it does not apply.
"""

# ruff: noqa: D103, ARG001 - arguments, and what they mean, are those of the function of torch of the same name

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sage.engine.joint.layers import Convolution, Embedding, LayerNorm, Lift, Linear, Rowwise

if TYPE_CHECKING:
    from hf_sage.engine.joint.mode import JointMode

Rule = Callable[..., Tensor | None]


def linear(mode: JointMode, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _linear(mode, input, weight, bias, transposed=False)


def matmul(mode: JointMode, input: Tensor, other: Tensor) -> Tensor | None:
    return _linear(mode, input, other, None, transposed=True)


def addmm(
    mode: JointMode, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    return _linear(mode, mat1, mat2, input, transposed=True) if beta == alpha == 1 and input.dim() == 1 else None


def _linear(mode: JointMode, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor | None:
    if not mode.is_rows(x) or x.dim() < 2 or weight.dim() != 2 or not mode.are_shared(weight, bias):
        return None
    of_weight, of_bias = mode.use(weight), mode.use(bias)
    return _applied(Linear, mode, x, weight, bias, of_weight, of_bias, transposed, mode.collector)


def convolution(
    mode: JointMode,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    n = weight.dim() - 2
    if isinstance(padding, str):
        if padding != "valid":
            return None
        padding = 0
    if not mode.is_rows(input) or input.dim() != weight.dim() or not mode.are_shared(weight, bias):
        return None
    shape = (*(_each(n, v) for v in (stride, padding, dilation)), groups)
    return _applied(Convolution, mode, input, weight, bias, mode.use(weight), mode.use(bias), shape, mode.collector)


def embedding(
    mode: JointMode,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    # A table of positions is looked up by numbers that are the same for all rows.
    if max_norm is not None or scale_grad_by_freq or sparse or input.dim() == 0 or len(input) != mode.rows.total:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return _applied(Embedding, mode, input, weight, padding_idx, mode.use(weight), mode.collector)


def layer_norm(
    mode: JointMode,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    shape = list(normalized_shape)
    if not mode.is_rows(input) or input.dim() <= len(shape) or not mode.are_shared(weight, bias):
        return None
    leaves = mode.use(weight), mode.use(bias)
    return _applied(LayerNorm, mode, input, weight, bias, *leaves, shape, eps, mode.collector)


def rms_norm(
    mode: JointMode,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    shape = tuple(normalized_shape)
    return _rowwise(mode, lambda x, w: F.rms_norm(x, shape, w, eps), input, weight, more=len(shape))


def group_norm(
    mode: JointMode,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    return _rowwise(mode, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps), input, weight, bias, more=1)


def _rowwise(
    mode: JointMode, function: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None, more: int
) -> Tensor | None:
    if not mode.is_rows(x) or x.dim() <= more or not mode.are_shared(*parameters):
        return None
    leaves = tuple(mode.use(p) for p in parameters)
    return _applied(Rowwise, mode, x, function, leaves, mode.collector, *parameters)


def expand(mode: JointMode, input: Tensor, *sizes: Any) -> Tensor | None:
    shape = tuple(sizes[0]) if sizes and isinstance(sizes[0], Sequence) else sizes
    rows = shape[0]
    is_new = len(shape) > input.dim() or (input.shape[0] == 1 and rows != 1)
    if not is_new or rows != mode.rows.total:
        return None
    return _applied(Lift, mode, input.detach(), shape, mode.use(input), mode.collector)


def elementwise(function: Callable[..., Tensor]) -> Rule:
    """The rule of a function that repeats what is smaller, as sums of entries do: what is shared is repeated here."""

    def rule(mode: JointMode, *args: Any, **kwargs: Any) -> Tensor | None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        rows = [t for t in tensors if mode.is_rows(t) and t.requires_grad]
        shared = [t for t in tensors if t in mode.collector]
        dims = max((t.dim() for t in rows), default=0)
        if not rows or any(t.dim() > dims or (t.dim() == dims and t.shape[0] != 1) for t in shared):
            return None
        length = next(t.shape[0] for t in rows if t.dim() == dims)

        def lifted(t: Any) -> Any:
            if not isinstance(t, Tensor) or t not in mode.collector:
                return t
            shape = (length, *[1] * (dims - 1 - t.dim()), *t.shape[t.dim() == dims :])
            return _applied(Lift, mode, t.detach(), shape, mode.use(t), mode.collector)

        return function(*map(lifted, args), **{name: lifted(value) for name, value in kwargs.items()})

    return rule


def _applied(function: Any, mode: JointMode, x: Tensor, *rest: Any) -> Tensor:
    given = [r.detach() if isinstance(r, Tensor) else r for r in rest]
    result: Tensor = function.apply(mode.anchor, x, *given)
    return result


def _each(n: int, value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


_T = torch.Tensor
_ROWS: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    _T.matmul: matmul,
    torch.mm: matmul,
    torch.addmm: addmm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    _T.expand: expand,
}
_ENTRIES = (
    *(torch.add, torch.sub, torch.mul, torch.div, torch.where, F.scaled_dot_product_attention),
    *(_T.add, _T.sub, _T.mul, _T.div, _T.add_, _T.sub_, _T.mul_, _T.div_, _T.__rsub__, _T.__rtruediv__),
)
RULES: dict[Any, Rule] = _ROWS | {function: elementwise(function) for function in _ENTRIES}
"""The rule for each function that may be called with a parameter."""
