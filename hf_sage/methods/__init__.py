"""Methods: an ascent, a chain of corrections, an objective and a hook under a name.

A method of one's own needs no registration: build a `Method` and pass it as ``SAGEConfig(method=...)``. The first line
of a builder's docstring and its signature are what ``hf-sage methods`` lists.
"""

from collections.abc import Callable

from hf_sage.methods.base import Method
from hf_sage.methods.groups import cdann, coral, dann, fish, fishr, gga, group_dro, irm, mmd, rsc, vrex
from hf_sage.methods.sage import erm, gga_l, sage, sage_no_noise, sage_no_polar, sage_no_scale, sgld
from hf_sage.methods.sharpness import (
    align_asam,
    align_sam,
    asam,
    disam,
    eigen_sam,
    friendly_sam,
    gam,
    gsam,
    look_sam,
    sagm,
    sam,
    vasso,
    x_sam,
)

__all__ = [
    "METHODS",
    "Method",
    "align_asam",
    "align_sam",
    "asam",
    "cdann",
    "coral",
    "dann",
    "disam",
    "eigen_sam",
    "erm",
    "fish",
    "fishr",
    "friendly_sam",
    "gam",
    "gga",
    "gga_l",
    "group_dro",
    "gsam",
    "irm",
    "look_sam",
    "mmd",
    "rsc",
    "sage",
    "sage_no_noise",
    "sage_no_polar",
    "sage_no_scale",
    "sagm",
    "sam",
    "sgld",
    "vasso",
    "vrex",
    "x_sam",
]

METHODS: dict[str, Callable[..., Method]] = {
    "sage": sage,
    "sage_no_polar": sage_no_polar,
    "sage_no_scale": sage_no_scale,
    "sage_no_noise": sage_no_noise,
    "sam": sam,
    "asam": asam,
    "gsam": gsam,
    "gam": gam,
    "sagm": sagm,
    "disam": disam,
    "friendly_sam": friendly_sam,
    "look_sam": look_sam,
    "vasso": vasso,
    "align_sam": align_sam,
    "align_asam": align_asam,
    "x_sam": x_sam,
    "eigen_sam": eigen_sam,
    "irm": irm,
    "vrex": vrex,
    "fishr": fishr,
    "coral": coral,
    "mmd": mmd,
    "group_dro": group_dro,
    "dann": dann,
    "cdann": cdann,
    "rsc": rsc,
    "fish": fish,
    "gga": gga,
    "gga_l": gga_l,
    "sgld": sgld,
    "erm": erm,
}
"""The methods that ``SAGEConfig(method="...")`` knows by name."""
