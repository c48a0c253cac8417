"""From stored images to what a model reads, with the name of the file wherever one cannot be read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_sage.data.draws import BatchDraws
from hf_sage.data.transforms import Augment

Stored = Image.Image | Mapping[str, Any] | str


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names its file."""


def undecoded(dataset: Any, image_column: str = "image") -> Any:
    """The dataset with its images left as stored (``{"path", "bytes"}``), so that an error can name the file."""
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def decode_image(value: Stored) -> Image.Image:
    """An image in RGB, upright, 8 bits a channel.

    Rotation noted by the camera (EXIF) is applied, transparency is laid on white, 16-bit grey levels are scaled, of an
    animation the first frame is taken.

    Args:
        value: A PIL image, a path, or a dictionary of ``path`` and ``bytes`` as `datasets` stores it.

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    try:
        return _as_rgb(value if isinstance(value, Image.Image) else Image.open(_file(value)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"Cannot read the image {image_name(value)}: {error}. Remove or replace the file, or leave unreadable "
            "images out by on_bad_image='skip' (--on-bad-image skip)."
        ) from error


def as_png(image: Image.Image) -> bytes:
    """The image as a PNG file, compressed lightly."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


class ImageCollator:
    """Decodes, augments, processes and batches rows of images and labels.

    Attributes:
        processor: An image processor of transformers.
        image_column: The column of the images.
        label_column: The column of the labels, if the rows have any.
        augment: What images go through before the processor, to the size that the model reads, e.g. a field of
            `hf_sage.data.transforms.Transforms`; ``None``: the processor alone, with its own resizing and cropping.
        draws: Where ``augment`` gets its chance from; `hf_sage.data.callback.DrawsCallback` makes a restart draw the
            same.
    """

    def __init__(
        self,
        processor: Any,
        image_column: str = "image",
        label_column: str = "label",
        augment: Augment | None = None,
    ) -> None:
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.augment = augment
        self.draws = BatchDraws()

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns ``pixel_values`` of shape (rows, 3, height, width) and ``labels`` of shape (rows,), int64.

        Raises:
            UnreadableImageError: If an image cannot be decoded.
        """
        images = [decode_image(feature[self.image_column]) for feature in features]
        options: dict[str, Any] = {}
        if self.augment is not None:
            generator = self.draws.next()
            images = [self.augment(image, generator) for image in images]
            options = {"do_resize": False, "do_center_crop": False}  # of the right size already
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt", **options)["pixel_values"]}
        if self.label_column in features[0]:
            batch["labels"] = torch.tensor([int(feature[self.label_column]) for feature in features])
        return batch


def _as_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 1
        return Image.fromarray((levels.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _file(value: Mapping[str, Any] | str) -> Any:
    if isinstance(value, str):
        return value
    return io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]


def image_name(value: Stored) -> str:
    """The file an image comes from, for a message."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return value.get("path") or "without a file name"
    return str(getattr(value, "filename", "")) or "without a file name"
