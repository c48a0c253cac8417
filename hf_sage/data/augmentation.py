"""DomainBed's augmentation of one image: what chance decides, and what is done then.

Pillow does the work, by itself or, where torchvision is installed and works, through its v2 operations; the result is
the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

SCALE = (0.7, 1.0)  # share of the area that a crop keeps
RATIO = (3 / 4, 4 / 3)  # width over height of a crop, before it is squeezed into a square
JITTER = 0.3  # of brightness, contrast and saturation: factors in [0.7, 1.3]; of the hue: turns in [-0.3, 0.3]
GREY = 0.1  # probability of losing all colour
ATTEMPTS = 10  # at a crop that fits


@dataclass(frozen=True)
class Draw:
    """What chance decided for one image.

    Attributes:
        box: Left, upper, width and height of the crop, in pixels.
        flip: Whether left and right are swapped.
        jitter: (what, factor) in the order they are applied: brightness, contrast, saturation, hue.
        grey: Whether colour is dropped.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool


def draw(size: tuple[int, int], generator: torch.Generator) -> Draw:
    """Draws what to do with an image.

    Args:
        size: Its width and height.
        generator: The source of all chance.
    """
    flip, grey = _uniform(generator) < 0.5, _uniform(generator) < GREY
    factors = {
        "brightness": _uniform(generator, 1 - JITTER, 1 + JITTER),
        "contrast": _uniform(generator, 1 - JITTER, 1 + JITTER),
        "saturation": _uniform(generator, 1 - JITTER, 1 + JITTER),
        "hue": _uniform(generator, -JITTER, JITTER),
    }
    names = list(factors)
    order = torch.randperm(len(names), generator=generator).tolist()
    return Draw(_crop(*size, generator), flip, tuple((names[i], factors[names[i]]) for i in order), grey)


def apply_by_pillow(image: Image.Image, drawn: Draw, size: tuple[int, int], resample: int) -> Image.Image:
    """Does to an image in RGB what was drawn, and resizes the crop to ``size`` (height, width)."""
    left, upper, width, height = drawn.box
    cropped = image.crop((left, upper, left + width, upper + height))
    image = cropped.resize(size[::-1], Image.Resampling(resample))
    if drawn.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for what, factor in drawn.jitter:
        image = _turn_hue(image, factor) if what == "hue" else _ENHANCERS[what](image).enhance(factor)
    return image.convert("L").convert("RGB") if drawn.grey else image


_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def operations() -> Callable[[Image.Image, Draw, tuple[int, int], int], Image.Image]:
    """`apply_by_torchvision` where torchvision is installed and works, else `apply_by_pillow`: the same images."""
    try:
        from hf_sage.data.torchvision_ops import apply_by_torchvision
    except (ImportError, RuntimeError, AttributeError):  # built for another torch, it fails in its own ways
        return apply_by_pillow
    return apply_by_torchvision


def _turn_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # Hue is a circle of 256 steps: bytes that overflow are what is wanted.
    turned = (np.asarray(hue, dtype=np.int16) + int(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _crop(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A box of a random area and a random ratio; in the middle, as large as can be, where ten attempts do not fit."""
    for _ in range(ATTEMPTS):
        area = width * height * _uniform(generator, *SCALE)
        ratio = math.exp(_uniform(generator, math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = (int(_uniform(generator, 0, room + 1)) for room in (width - w, height - h))
            return left, upper, w, h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
