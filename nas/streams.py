"""Named, seeded random streams: every draw of the package comes from one of these.

A stream is a function of its name, not of what was drawn before it: the augmentation of epoch 7 is the
same whether epochs 0 to 6 ran in this process or in one that was killed, and drawing more from one stream
never moves another.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, *name: str | int) -> int:
    """63-bit seed of the stream `name` under `seed`, from SHA-256 and so alike on every platform."""
    digest = hashlib.sha256(repr((int(seed), *name)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator at the start of the stream `name`, e.g. `generator(0, "augment", "search", 7)`."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *name))


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Context in which PyTorch's default initialisers draw from the stream `name`.

    The global state is put back after it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, *name))
        yield
