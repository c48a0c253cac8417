"""Who runs a job: one process at a time among all that share a folder, and a dead one's claim can be taken over.

The claims on a job are files ``claim-0``, ``claim-1``, ... in its folder; the highest one holds. A claim is made by
creating the next file, which a file system lets only one process do; so two that find the same dead owner
cannot both succeed it, and one that dies while succeeding is succeeded like any other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

BEAT_SECONDS = 30.0
"""How often an owner shows that it is alive."""

STALE_SECONDS = 600.0
"""Silence after which an owner on another machine is taken for dead. One on this machine is looked up."""


class ClaimedError(Exception):
    """The job is held by another process; the message says by which."""


class Claim:
    """A claim on a folder, held until the ``with`` block ends or the process dies.

    Args:
        folder: The job's folder; must exist.

    Raises:
        ClaimedError: From ``with``, if another living process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = uuid.uuid4().hex
        self._released = threading.Event()

    def __enter__(self) -> Claim:
        held = _claims(self._folder)
        if held and (owner := living_owner(self._folder)) is not None:
            raise ClaimedError(owner)
        file = self._folder / f"claim-{_number(held[-1]) + 1 if held else 0}"
        me = psutil.Process()
        identity = {"token": self._token, "host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
        try:
            with file.open("x", encoding="utf-8") as new:
                json.dump(identity, new)
        except FileExistsError:
            raise ClaimedError("a process that was faster") from None
        if len(_claims(self._folder)) != len(held) + 1:  # others came and went since we looked
            file.unlink(missing_ok=True)
            raise ClaimedError("a process that was faster")
        threading.Thread(target=self._beat, args=(file,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        if self.lost:
            return
        for file in _claims(self._folder):  # the highest last, so that a lower one never seems to hold
            file.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """Whether another process has taken over: one that slept for long is taken for dead."""
        claims = _claims(self._folder)
        return not claims or _read(claims[-1]).get("token") != self._token

    def _beat(self, file: Path) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)


def living_owner(folder: Path) -> str | None:
    """The process that holds a folder, in words; ``None`` if none does, or a dead one."""
    claims = _claims(folder)
    if not claims:
        return None
    owner = _read(claims[-1])
    words = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown machine')}"
    if owner.get("host") == socket.gethostname() and psutil.pid_exists(owner["pid"]):
        with suppress(psutil.Error):
            # A process of that number that started at another time is another process.
            return words if abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1 else None
    if owner.get("host") == socket.gethostname():
        return None
    return words if _age(claims[-1]) < STALE_SECONDS else None


def is_abandoned(folder: Path) -> bool:
    """Whether a process that is now dead was at work there."""
    return bool(_claims(folder)) and living_owner(folder) is None


def _claims(folder: Path) -> list[Path]:
    return sorted(folder.glob("claim-*"), key=_number)


def _number(file: Path) -> int:
    return int(file.name.rpartition("-")[2])


def _read(file: Path) -> dict[str, Any]:
    """The owner; nothing while it is still being written, or where it was cut short."""
    try:
        owner: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner


def _age(file: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system that noted it."""
    probe = file.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0  # gone, or a disk that takes nothing: let it be
    finally:
        probe.unlink(missing_ok=True)
