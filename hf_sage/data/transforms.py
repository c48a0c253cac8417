"""What images go through before the model's processor, by the name of a protocol.

Images are cropped, flipped and recoloured, or squashed, and then rescaled and normalised by the processor, so that mean
and standard deviation are the checkpoint's (CLIP's for CLIP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from PIL import Image

from hf_sage.data.augmentation import Draw, draw, operations

Augment: TypeAlias = Callable[[Image.Image, torch.Generator], Image.Image]
"""An image in RGB and the source of all chance -> an image of the size that the model reads."""


@dataclass(frozen=True)
class DomainBedAugmentation:
    """A random crop, flip, colour jitter and greying: DomainBed's augmentation of training images.

    Attributes:
        size: Height and width of the result.
        resample: How pixels are interpolated, a number of `PIL.Image.Resampling`.
        apply: Does what was drawn.
    """

    size: tuple[int, int]
    resample: int
    apply: Callable[[Image.Image, Draw, tuple[int, int], int], Image.Image]

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Draws and applies."""
        return self.apply(image, draw(image.size, generator), self.size, self.resample)


@dataclass(frozen=True)
class Squash:
    """The whole image, squeezed into the model's size: what DomainBed tests on.

    Attributes:
        size: Height and width of the result.
        resample: How pixels are interpolated, a number of `PIL.Image.Resampling`.
    """

    size: tuple[int, int]
    resample: int

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Resizes; nothing is left to chance."""
        return image.resize(self.size[::-1], Image.Resampling(self.resample))


@dataclass(frozen=True)
class Transforms:
    """What images of each use go through before the processor; ``None``: the processor alone.

    Attributes:
        train: Of images trained on.
        validation: Of source domains' images kept from training.
        test: Of the held-out domain's images.
    """

    train: Augment | None = None
    validation: Augment | None = None
    test: Augment | None = None


TransformName = Literal["domainbed", "swad", "none"]

TRANSFORMS: tuple[str, ...] = get_args(TransformName)
"""The names that `image_transforms` knows."""


def image_transforms(name: str, processor: Any) -> Transforms:
    """The transforms of a protocol for a model.

    Args:
        name: ``"domainbed"``: training images are augmented, *and so are those validated on*; ``"swad"``: the latter
            are not (Cha et al. 2021, arXiv 2102.08604). Both squash whole images where they do not augment. ``"none"``:
            the processor alone, with its own resizing and cropping.
        processor: The model's image processor: gives the size and the interpolation (CLIP's is bicubic), and later
            mean and standard deviation.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in TRANSFORMS:
        raise ValueError(f"Unknown transform {name!r}: use one of {', '.join(map(repr, TRANSFORMS))}.")
    if name == "none":
        return Transforms()
    size, resample = input_size(processor), int(processor.resample)
    augment = DomainBedAugmentation(size, resample, operations())
    squash = Squash(size, resample)
    return Transforms(train=augment, validation=augment if name == "domainbed" else squash, test=squash)


def input_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that come out of an image processor."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])
