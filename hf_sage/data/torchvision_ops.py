"""The augmentation by torchvision's v2 operations; to be imported only where torchvision works."""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from hf_sage.data.augmentation import Draw

_MODES = {
    Image.Resampling.NEAREST: InterpolationMode.NEAREST,
    Image.Resampling.BOX: InterpolationMode.BOX,
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.HAMMING: InterpolationMode.HAMMING,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}
_ADJUST = {
    "brightness": v2.adjust_brightness,
    "contrast": v2.adjust_contrast,
    "saturation": v2.adjust_saturation,
    "hue": v2.adjust_hue,
}


def apply_by_torchvision(image: Image.Image, drawn: Draw, size: tuple[int, int], resample: int) -> Image.Image:
    """As `hf_sage.data.augmentation.apply_by_pillow`, and with the same result to the bit: images stay Pillow's.

    On tensors torchvision would compute otherwise, by up to 12 of 256 levels, and not faster on a CPU.
    """
    left, upper, width, height = drawn.box
    mode = _MODES[Image.Resampling(resample)]
    image = v2.resized_crop(image, upper, left, height, width, list(size), interpolation=mode)
    if drawn.flip:
        image = v2.horizontal_flip(image)
    for what, factor in drawn.jitter:
        image = _ADJUST[what](image, factor)
    return v2.rgb_to_grayscale(image, num_output_channels=3) if drawn.grey else image
