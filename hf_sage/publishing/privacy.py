"""Secrets and local paths: how to know them, and how to keep them out of what is saved to be published."""

from __future__ import annotations

import copy
import json
import mmap
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_token

SECRET_NAME = re.compile(r"(^|_)((hub|api|auth|access)_(token|key)|token|password|secret)$", re.IGNORECASE)
"""Names of fields that hold credentials: ``hub_token``, ``push_to_hub_token``, ``use_auth_token``, ``api_key``, ...

Fields of this kind that are words of a vocabulary (``eos_token``, ``pad_token``) are `NOT_SECRET`.
"""

NOT_SECRET = re.compile(r"^(eos|bos|pad|unk|sep|cls|mask|image|video|audio|stop)_token$", re.IGNORECASE)

ACCESS_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{34}")
"""The look of an access token of the Hub, under whatever name; in a pickle, anything may follow it."""

T = TypeVar("T")


class Veiled(str):
    """A text that reads as it is and pickles as what others may see of it.

    Args:
        text: The text.
        shown: What a pickle holds in its place.
    """

    shown: str | None

    def __new__(cls, text: str, shown: str | None) -> Veiled:
        """A text with what is shown of it."""
        veiled = super().__new__(cls, text)
        veiled.shown = shown
        return veiled

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[Any, ...]]:
        return (type(None), ()) if self.shown is None else (str, (self.shown,))


def veiled(arguments: T) -> T:
    """A copy of an object with fields that pickles without its secrets and local paths, and otherwise is the same.

    Secrets pickle as ``None``, absolute paths as their last part, at any depth of dictionaries and lists. The copy
    itself still reads as the original: what uses it can log in and find its files.
    """
    twin = copy.copy(arguments)
    for name, value in vars(twin).items():
        vars(twin)[name] = _map_texts(value, name, _veil)
    return twin


def without_local_paths(value: Any) -> Any:
    """The value, as read from JSON, with absolute paths cut to their last part at any depth."""
    return _map_texts(value, "", lambda _, text: Path(text).name if is_local_path(text) else text)


def is_local_path(text: str) -> bool:
    """Whether a text is an absolute path of this machine, or one below the home directory."""
    return "\n" not in text and (os.path.isabs(text) or text.startswith("~/")) and text.strip("/") != ""


def is_secret(name: str, value: object) -> bool:
    """Whether a field is one for credentials, or holds what looks like an access token."""
    by_name = SECRET_NAME.search(name) is not None and NOT_SECRET.match(name) is None
    return isinstance(value, str) and (by_name or ACCESS_TOKEN.search(value.encode()) is not None)


def public_configuration(file: Path) -> str | None:
    """A JSON file without its local paths; ``None`` where it has none and is fit to be published as it is."""
    found = json.loads(file.read_text(encoding="utf-8"))
    clean = without_local_paths(found)
    return None if clean == found else json.dumps(clean, indent=2, ensure_ascii=False) + "\n"


def hide_local_paths(folder: str | Path) -> None:
    """Cuts absolute paths to their last part in the configurations of a folder: ``config.json`` and its like."""
    for file in sorted(Path(folder).glob("*config.json")):
        if (public := public_configuration(file)) is not None:
            file.write_text(public, encoding="utf-8")


def secrets_in(file: Path) -> list[str]:
    """The secrets that a file gives away, masked; the members of zip archives (``training_args.bin``) are read too.

    Looks for what has the look of an access token, and for the token this process would log in with.
    """
    own = get_token()
    found: set[str] = set()
    for content in _contents(file):
        found |= {token.decode() for token in ACCESS_TOKEN.findall(content)}
        if own and content.find(own.encode()) >= 0:
            found.add(own)
    return sorted(f"{token[:4]}…{token[-2:]}" for token in found)


def _contents(file: Path) -> Iterator[bytes | mmap.mmap]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                yield archive.read(member)
    elif file.stat().st_size:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _veil(name: str, text: str) -> str:
    if is_secret(name, text):
        return Veiled(text, None)
    return Veiled(text, Path(text).name) if is_local_path(text) else text


def _map_texts(value: Any, name: str, change: Callable[[str, str], str]) -> Any:
    """The value with every text changed, by its name and content; containers are copied, other things are kept."""
    if type(value) is str:
        return change(name, value)
    if type(value) is dict:
        return {key: _map_texts(item, str(key), change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_texts(item, name, change) for item in value)
    return value
