"""The pictures of the embedded benchmark: each renderer draws every scan once in each of its domains.

Pure functions of ``(scans, digits, rng)``; nothing here knows of ``datasets``. The source images are scikit-learn's
handwritten digits and its two photographs, which come inside its wheel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from scipy import ndimage
    from sklearn.datasets import load_digits, load_sample_image
except ImportError as error:
    raise ImportError('The embedded benchmark needs scikit-learn and scipy: pip install "hf-sage[demo]"') from error

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Integers = NDArray[np.int64]

SIDE = 16  # pixels, of every image made here
MARGIN = 1  # empty pixels around the digit: room for its outline and, in part, for its corners when it turns
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
PHOTO_REDUCTION = 2  # photographs are halved, so that a patch of 16 pixels shows texture and not a flat spot
INK = 0.45  # grey level from which on a pixel belongs to the stroke
MIN_CONTRAST = 0.6  # Euclidean distance of the two colours in the RGB unit cube, whose corners are at most √3 apart
ANGLES = (0, 15, 30, 45, 60, 75)  # degrees, counter-clockwise
LABEL_NOISE = 0.25
COLOR_FLIPS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}  # domain -> probability that the colour is not the label


class Rendering(NamedTuple):
    """Every scan in every domain.

    Attributes:
        images: Domain name -> ``(scans, 16, 16, 3)`` images.
        labels: ``(scans,)`` class ids; a scan has the same label in every domain.
        class_names: The names of the classes, by id.
    """

    images: dict[str, Pixels]
    labels: Integers
    class_names: list[str]


def load_scans() -> tuple[Floats, Integers]:
    """The handwritten digits, upsampled smoothly.

    Returns:
        ``(1797, 16, 16)`` grey levels in [0, 1] (1 is ink) and the ``(1797,)`` digits.
    """
    source = load_digits()
    factor = (SIDE - 2 * MARGIN) / source.images.shape[-1]
    smooth = ndimage.zoom(source.images / 16, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True)
    padded = np.pad(smooth, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    return padded.clip(0, 1).astype(np.float32), source.target.astype(np.int64)


def style_digits(scans: Floats, digits: Integers, rng: np.random.Generator) -> Rendering:
    """Four styles of a digit: plain, before a photograph, as a pencil outline, in two flat colours."""
    ink = scans[..., None]
    grey = np.repeat(ink, 3, axis=-1)
    back, fore = _contrasting_colors(len(scans), rng)
    images = {
        "plain": _pixels(grey),
        "photo": _pixels(np.abs(grey - _photo_patches(len(scans), rng))),  # as MNIST-M: Ganin et al. 2016
        "sketch": _pixels(1 - np.repeat(_outline(scans)[..., None], 3, axis=-1)),
        "color": _pixels(back + (fore - back) * ink),
    }
    return Rendering(images, digits, [str(digit) for digit in range(10)])


def rotated_digits(scans: Floats, digits: Integers, rng: np.random.Generator) -> Rendering:  # noqa: ARG001 - no chance in it
    """Six rotations of a digit, after DomainBed's RotatedMNIST (bilinear, black where nothing is known)."""
    images = {}
    for angle in ANGLES:
        turned = ndimage.rotate(scans, angle, axes=(1, 2), reshape=False, order=1)
        images[str(angle)] = _pixels(np.repeat(turned[..., None], 3, axis=-1))
    return Rendering(images, digits, [str(digit) for digit in range(10)])


def colored_digits(scans: Floats, digits: Integers, rng: np.random.Generator) -> Rendering:
    """Red and green digits, after DomainBed's ColoredMNIST (Arjovsky et al. 2019): colour predicts the label, or not.

    The label is "0-4" or "5-9", wrong with probability 0.25; the colour is the label, flipped with the domain's
    probability. DomainBed deals each scan to one domain; here, where scans are few, each is in every domain, with the
    same noisy label and a colour drawn anew.
    """
    labels = ((digits < 5) ^ (rng.random(len(digits)) < LABEL_NOISE)).astype(np.int64)
    images = {}
    for name, flip in COLOR_FLIPS.items():
        color = labels ^ (rng.random(len(labels)) < flip)  # 0: red, 1: green
        image = np.zeros((*scans.shape, 3), dtype=np.float32)
        image[np.arange(len(scans)), :, :, color] = scans
        images[name] = _pixels(image)
    return Rendering(images, labels, ["5-9", "0-4"])


def _pixels(image: NDArray[np.floating]) -> Pixels:
    """[0, 1] to 0..255."""
    return np.asarray(np.rint(image.clip(0, 1) * 255), dtype=np.uint8)


def _outline(scans: Floats) -> Floats:
    """The rim of the stroke, one pixel wide."""
    neighbours = ndimage.generate_binary_structure(2, 1)[None]
    ink = scans > INK
    return np.asarray(ink & ~ndimage.binary_erosion(ink, neighbours), dtype=np.float32)


def _photo_patches(count: int, rng: np.random.Generator) -> Floats:
    """``(count, 16, 16, 3)`` random patches of the photographs, in [0, 1]."""
    step = PHOTO_REDUCTION
    photos = np.stack([load_sample_image(name) for name in PHOTOGRAPHS]).astype(np.float32) / 255
    height, width = photos.shape[1] // step, photos.shape[2] // step
    photos = photos[:, : height * step, : width * step].reshape(len(photos), height, step, width, step, 3).mean((2, 4))
    which = rng.integers(len(photos), size=count)
    top, left = rng.integers(height - SIDE + 1, size=count), rng.integers(width - SIDE + 1, size=count)
    rows = top[:, None, None] + np.arange(SIDE)[:, None]
    columns = left[:, None, None] + np.arange(SIDE)
    return np.asarray(photos[which[:, None, None], rows, columns])


def _contrasting_colors(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two ``(count, 1, 1, 3)`` colours each, uniform among the pairs that can be told apart."""
    pairs = rng.random((2, count, 3), dtype=np.float32)
    while (poor := np.linalg.norm(pairs[0] - pairs[1], axis=-1) < MIN_CONTRAST).any():
        pairs[:, poor] = rng.random((2, int(poor.sum()), 3), dtype=np.float32)
    return pairs[0, :, None, None], pairs[1, :, None, None]
