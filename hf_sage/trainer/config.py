"""The fields that hf_sage adds to TrainingArguments."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from transformers import TrainingArguments

from hf_sage.ascents import BiasRadius
from hf_sage.methods import METHODS, Method
from hf_sage.polar import PolarPreset, check_polar

if TYPE_CHECKING:
    MethodOrName: TypeAlias = str | Method
else:  # argument parsers read the annotation at run time, and from a command line a method comes by name only
    MethodOrName = str
DomainSampling = Literal["balanced", "natural"]
PerturbationScope = Literal["global", "local"]


@dataclass
class SAGEArguments:
    """The fields of a two-pass, group-aware step; combine them with the arguments class of any trainer.

    > Parameters that choose the method

    Attributes:
        method: A name that `hf-sage methods` lists, or a `hf_sage.methods.Method` of your own.
        rho: Perturbation radius ρ ≥ 0; ``None`` is the method's own default (SAGE 1e-6, for CLIP
            fine-tuning; SAM 0.05).
        gamma: Noise scale γ ≥ 0; ``None`` is the method's own default (SAGE 1e-6).
        method_options: Further hyperparameters of the method by name, e.g. ``{"alpha": 0.4}`` for GSAM; on the command
            line as JSON. `hf-sage methods` lists them.
        ascent_interval: The second pass is taken in every so-manieth update only; 1 is every one.
        classifier: Name of the module from features to logits, for methods that need features; ``None`` looks for
            one of the usual names.

    > Parameters of the spectral ascent

    Attributes:
        polar: Preset of the polar factor, see `hf_sage.polar.polar_factor`. ``"auto"`` is ``"halley"`` on a CPU and
            ``"polar_express"`` elsewhere.
        polar_steps: Its number of iterations; the paper's T = 5. ``"halley"`` and ``"svd"`` ignore it.
        bias_radius: ``"fixed"``, the paper's ρ g/‖g‖ for 1-D tensors, or ``"norm"``, ρ‖b‖ g/‖g‖.
        weight_scale: Whether to multiply a matrix' perturbation by ‖W‖_F.

    > Parameters of the groups

    Attributes:
        domain_column: Name of the column that holds the group; ``None`` trains as one group: ascent only, no agreement,
            no noise.
        domain_sampling: ``"balanced"`` (an equal share of every group in every batch) or ``"natural"`` (as it is).
        perturbation_scope: ``"global"``: ε and S from the whole batch over all ranks and accumulation steps;
            ``"local"``: each micro-batch of each rank has its own ε (m-sharpness).
        same_dropout: Whether the second pass draws the first pass's dropout masks.

    > Parameters of the precision

    Attributes:
        full_precision_passes: Whether both passes run in fp32: without the autocast of ``bf16`` or ``fp16``, which
            evaluation keeps, and without TF32. A small ρ needs it: at ρ = 1e-6, 2% of the perturbed entries survive
            the cast to bf16. It cannot help weights that are themselves bf16 or fp16.
    """

    method: MethodOrName = field(
        default="sage", metadata={"help": f"One of {', '.join(METHODS)}, or (from Python) a Method object."}
    )
    rho: float | None = field(
        default=None, metadata={"help": "Perturbation radius; by default the method's own (SAGE 1e-6, SAM 0.05)."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Noise scale; by default the method's own (SAGE 1e-6)."}
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Further hyperparameters of the method, as JSON: {"alpha": 0.4}.'}
    )
    ascent_interval: int = field(default=1, metadata={"help": "Take the second pass in every so-manieth update only."})
    classifier: str | None = field(
        default=None, metadata={"help": "Module from features to logits, for methods that need features."}
    )
    polar: PolarPreset = field(
        default="auto",
        metadata={"help": "Polar factor: auto, halley, polar_express, muon (quintic), cubic (eq. 7), svd (exact)."},
    )
    polar_steps: int = field(default=5, metadata={"help": "Iterations of the polar factor; halley and svd ignore it."})
    bias_radius: BiasRadius = field(
        default="fixed", metadata={"help": "Radius of 1-D tensors: fixed (the paper's) or norm (relative)."}
    )
    weight_scale: bool = field(default=True, metadata={"help": "Scale a matrix' perturbation by its Frobenius norm."})
    domain_column: str | None = field(
        default="domain", metadata={"help": "Column that holds the group; 'none' trains as one group."}
    )
    domain_sampling: DomainSampling = field(
        default="balanced",
        metadata={"help": "balanced: equal share of every group in every batch; natural: as it is."},
    )
    perturbation_scope: PerturbationScope = field(
        default="global", metadata={"help": "global: one perturbation a step; local: one a micro-batch and rank."}
    )
    same_dropout: bool = field(
        default=False, metadata={"help": "Draw the first pass's dropout masks in the second pass again."}
    )
    full_precision_passes: bool = field(
        default=False, metadata={"help": "Run both passes in fp32, without autocast and TF32; a small rho needs it."}
    )

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: If a field has a value it cannot have; the message lists those it can.
        """
        if self.domain_column is not None and self.domain_column.lower() == "none":
            self.domain_column = None
        # YAML reads 1e-6 as text, as TrainingArguments knows of its learning rate.
        self.rho = None if self.rho is None else float(self.rho)
        self.gamma = None if self.gamma is None else float(self.gamma)
        if isinstance(self.method_options, str):
            self.method_options = _parsed_options(self.method_options)
        check_polar(self.polar, self.polar_steps)
        _one_of("bias_radius", self.bias_radius, get_args(BiasRadius))
        _one_of("domain_sampling", self.domain_sampling, get_args(DomainSampling))
        _one_of("perturbation_scope", self.perturbation_scope, get_args(PerturbationScope))
        self.build_method()
        # Alone this class has no parent to tell; beside any TrainingArguments it has.
        if isinstance(self, TrainingArguments):
            super().__post_init__()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As the arguments class beside this one does it, with a Method object by its name."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # of TrainingArguments
        if isinstance(self.method, Method):
            fields["method"] = self.method.name
        return fields

    def build_method(self) -> Method:
        """The method these fields describe.

        Raises:
            ValueError: If the name is unknown, or ρ, γ or a field of the ascent is not one the method takes.
        """
        options = dict(self.method_options or {})  # type: ignore[arg-type]  # parsed by now
        options |= {name: value for name, value in (("rho", self.rho), ("gamma", self.gamma)) if value is not None}
        if isinstance(self.method, Method):
            if options or self.ascent_interval != 1:
                given = [*options, *(["ascent_interval"] if self.ascent_interval != 1 else [])]
                raise ValueError(
                    f"{' and '.join(given)} cannot be set beside a Method object, which has its own. "
                    "Set them where the Method is built."
                )
            return self.method
        if self.method not in METHODS:
            raise ValueError(
                f"Unknown method {self.method!r}: use one of {', '.join(map(repr, METHODS))}, or a Method. "
                "SWAD is a callback (hf_sage.trainer.swad), and Muon an optimizer (hf_sage.trainer.muon)."
            )
        build = METHODS[self.method]
        takes = inspect.signature(build).parameters
        if unknown := [name for name in options if name not in takes]:
            raise ValueError(
                f"Method {self.method!r} has no {' and no '.join(unknown)}: leave that "
                f"unset. It takes {', '.join(takes) or 'no hyperparameters'}."
            )
        shape: dict[str, object] = {"polar": self.polar, "polar_steps": self.polar_steps}
        shape |= {"bias_radius": self.bias_radius, "weight_scale": self.weight_scale}
        method = build(**{name: value for name, value in shape.items() if name in takes} | options)
        return method if self.ascent_interval == 1 else replace(method, ascent_interval=self.ascent_interval)


@dataclass
class SAGEConfig(SAGEArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of `SAGEArguments`.

    Example:
        >>> args = SAGEConfig("out", rho=1e-6, gamma=1e-6, domain_column="domain")
    """


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}: use one of {', '.join(map(repr, allowed))}.")


def _parsed_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f'method_options must be a JSON object such as {{"alpha": 0.4}}; got {text!r}.')
    return options
