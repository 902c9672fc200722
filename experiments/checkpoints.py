"""Checkpoints: the state of a trial in one file, written whole or not at all, and checked when it is read.

They are the platform's own and lie in the study's folder, so a trial goes on from its newest one whatever was
killed: its worker, its node, or the driver and with it all that Ray Tune knew.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

KEEP = 2
"""Checkpoints kept of a trial: the newest, and the one to fall back to."""

_MAGIC = b"nas checkpoint 1\n"
_DIGEST = hashlib.sha256().digest_size


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of plain containers and tensors so that `path` holds all of it or what it held before.

    Raises:
        OSError: the disk is full or gone; `path` is as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may write one trial for a moment: a lost node's worker does not know that it is lost.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC)
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `write` was given, tensors on `device`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a checkpoint, or not as it was written: cut short, or changed.
    """
    content = memoryview(path.read_bytes())
    start = len(_MAGIC) + _DIGEST
    if content[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is not a checkpoint of this version")
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise ValueError(f"{path} is not as it was written: its checksum differs")
    state: dict[str, Any] = torch.load(io.BytesIO(content[start:]), weights_only=True, map_location=device)
    return state


class Checkpoints:
    """The last checkpoints of one trial: `folder/<trial>/<epochs done>.pt`."""

    def __init__(self, folder: Path, trial: str) -> None:
        self.folder = folder / trial

    def save(self, epochs: int, state: Mapping[str, Any]) -> None:
        """Write the state after `epochs` epochs, and remove all but the newest `KEEP` up to there.

        Later ones go too: they are of a state that was given up, for one that began anew or was copied.

        Raises:
            OSError: as in `write`; the checkpoints before it are left alone.
        """
        path = self.folder / f"{epochs:06}.pt"
        write(path, state)
        earlier = [old for old in self._files() if old.name <= path.name]
        for old in set(self._files()) - set(earlier[:KEEP]):
            old.unlink(missing_ok=True)

    def load(self, device: torch.device | str = "cpu") -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that can be read, None if there is none; and why newer ones cannot."""
        doubts: list[str] = []
        for path in self._files():
            try:
                return read(path, device), doubts
            except OSError as error:
                doubts.append(str(error))
            except ValueError as error:
                doubts.append(str(error))
                path.unlink(missing_ok=True)  # or it would stay in the place of one to fall back to
        return None, doubts

    def clear(self) -> None:
        """Remove all; nothing is said of what cannot be removed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"), reverse=True)
