"""RotatedMNIST and ColoredMNIST, made from MNIST's four files as DomainBed makes them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_sage.data.images import as_png

MNIST_DOMAINS = {"RotatedMNIST": ("0", "15", "30", "45", "60", "75"), "ColoredMNIST": ("+90%", "+80%", "-90%")}
"""The names that `load_mnist_domains` knows, and their domains."""

MNIST_CLASSES = {"RotatedMNIST": tuple("0123456789"), "ColoredMNIST": ("5-9", "0-4")}
"""Their classes, by id."""

LABEL_NOISE = 0.25
COLOR_FLIPS = (0.1, 0.2, 0.9)  # of ColoredMNIST's domains: how often the colour is not the label


def load_mnist_domains(name: str, root: str | Path, seed: int = 0) -> datasets.Dataset:
    """Makes one of DomainBed's two sets from MNIST.

    Training and test images are shuffled together and dealt out, so that each is in one domain. RotatedMNIST turns them
    (bilinear, black where nothing is known). ColoredMNIST (Arjovsky et al. 2019) draws them in red or green; the label
    is whether the digit is below 5, wrong with probability 0.25, and the colour is the label, flipped with the
    domain's probability. The draws are DomainBed's after torch was seeded by ``seed``.

    Args:
        name: ``"RotatedMNIST"`` or ``"ColoredMNIST"``.
        root: The folder of MNIST's four files (``train-images-idx3-ubyte``, ...; gzipped or not), or one that has them
            under ``MNIST/raw`` as torchvision lays them out.
        seed: Of the shuffle, the label noise and the colours.

    Returns:
        Columns ``image`` (28 × 28 RGB, stored as PNG), ``label`` and ``domain`` (ClassLabels).

    Raises:
        ValueError: If a file is missing or is not of MNIST's format.
    """
    folder = _folder(Path(root))
    images, digits = (
        torch.from_numpy(np.concatenate([_read_idx(folder, f"{part}-{kind}") for part in ("train", "t10k")]))
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    domains = MNIST_DOMAINS[name]
    columns: dict[str, list[object]] = {"image": [], "label": [], "domain": []}
    for i, domain in enumerate(domains):
        own = order[i :: len(domains)]
        if name == "RotatedMNIST":
            labels, pictures = digits[own], _turned(images[own], int(domain))
        else:
            labels, pictures = _colored(images[own], digits[own], COLOR_FLIPS[i], generator)
        columns["image"] += [{"bytes": as_png(picture), "path": None} for picture in pictures]
        columns["label"] += labels.tolist()
        columns["domain"] += [i] * len(own)
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=list(MNIST_CLASSES[name])),
        domain=datasets.ClassLabel(names=list(domains)),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _turned(images: Tensor, angle: int) -> Iterator[Image.Image]:
    for image in images.numpy():
        yield Image.fromarray(image).rotate(angle, resample=Image.Resampling.BILINEAR).convert("RGB")


def _colored(
    images: Tensor, digits: Tensor, flip: float, generator: torch.Generator
) -> tuple[Tensor, Iterator[Image.Image]]:
    def wrong(probability: float) -> Tensor:
        return torch.rand(len(digits), generator=generator) < probability

    labels = (digits < 5) ^ wrong(LABEL_NOISE)
    colors = (labels ^ wrong(flip)).long()  # 0: red, 1: green
    painted = torch.zeros(*images.shape, 3, dtype=torch.uint8)
    painted[torch.arange(len(images)), :, :, colors] = images
    return labels.long(), (Image.fromarray(picture) for picture in painted.numpy())


def _folder(root: Path) -> Path:
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    raise ValueError(
        f"No train-images-idx3-ubyte under {root} or {root / 'MNIST' / 'raw'}: MNIST's files belong there."
    )


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An array in MNIST's format: two zero bytes, the type (8: bytes), the number of sizes, the sizes, the values."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not zipped.is_file():
        raise ValueError(f"There is no {plain}, nor {zipped.name} beside it.")
    try:
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(zipped.read_bytes())
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("it does not begin as an array of bytes does")
        start = 4 + 4 * content[3]
        return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4")).copy()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{folder / name} is not a file of MNIST, or is cut short: {error}") from error
