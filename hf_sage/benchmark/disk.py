"""A full disk, told from other failures and explained."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITERS = ("PytorchStreamWriter", "inline_container.cc")
"""What torch.save says when its writer has failed, for whatever reason."""

LITTLE_SPACE = 64 * 2**20
"""Bytes left at which a writer that failed without saying why is taken to have filled the disk."""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a full disk or an exhausted quota is behind an error, also of a library that does not say so."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(cause) for sign in ("No space left on device", "Disk quota exceeded", "os error 28")):
            return True
    said = " ".join(map(str, _chain(error)))
    return any(sign in said for sign in _WRITERS) and shutil.disk_usage(folder).free < LITTLE_SPACE


@contextmanager
def full_disk_explained(folder: Path, cure: str) -> Iterator[None]:
    """Raises an OSError that says what to do where a full disk is behind an error; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        raise OSError(f"The disk that holds {folder} is full ({error}). {cure}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
