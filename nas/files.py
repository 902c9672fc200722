"""Image files that are decoded when their batch is due, by threads that work ahead of the training.

Threads and not processes: Pillow lets go of the interpreter while it decodes and scales, which is nine tenths
of the work, so about ten threads keep as many cores busy. They start at once, write straight into the batch,
and need neither shared memory nor a second PyTorch.
"""

import io
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
"""Images `(N, C, H, W)`."""
Integers = npt.NDArray[np.int64]
"""Labels or positions `(N,)`."""

Names = npt.NDArray[np.bytes_]
"""Paths of files, `(N,)`."""

THREAD_NAME = "nas-decode"
BATCHES_AHEAD = 2
IMAGES_AHEAD = 2
"""Images begun for each thread, at least, where batches are small."""
CROP_DRAWS = 22
"""Uniform numbers that choose one box: ten areas, ten ratios, and a corner."""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files by name, each read as RGB of one size when asked for."""

    folder: str
    names: Names
    """Paths below `folder`: one array, which Ray keeps once per node, as it would not keep a list."""
    side: int
    """Height and width of images once read, in pixels."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape that all images would have as one array."""
        return len(self), 3, self.side, self.side

    def take(self, positions: Integers) -> "Files":
        """The files at `positions`, in that order."""
        return replace(self, names=self.names[positions])

    def path(self, index: int) -> str:
        """Where an image lies."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def sizes(self, workers: int) -> Integers:
        """Bytes of each file; asked for in threads, as each answer may have to cross a network."""
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda index: os.stat(self.path(index)).st_size, range(len(self)))
            return np.fromiter(found, np.int64, len(self))

    def whole(self, index: int) -> Pixels:
        """One image `(3, S, S)` for evaluation: its shorter side scaled to 8/7 S, then its centre.

        Source: torchvision's Resize(256) and CenterCrop(224), of which the ratio is 8/7.
        """
        image = self._rgb(index)
        short = round(self.side * 8 / 7)
        width, height = image.size
        if width <= height:
            size = short, int(short * height / width)
        else:
            size = int(short * width / height), short
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((length - self.side) / 2) for length in size)
        return _channels_first(image.crop((left, top, left + self.side, top + self.side)))

    def cropped(self, index: int, uniform: npt.NDArray[np.float32], flip: bool) -> Pixels:
        """The box that `uniform` chooses of one image, scaled to `(3, S, S)`, mirrored if `flip`.

        The box is cut before it is scaled, as torchvision does: no pixel outside it enters.
        """
        image = self._rgb(index)
        top, left, height, width = boxes(uniform[None], image.height, image.width)[0].astype(int).tolist()
        image = image.crop((left, top, left + width, top + height))
        pixels = _channels_first(image.resize((self.side, self.side), Image.Resampling.BILINEAR))
        return pixels[:, :, ::-1] if flip else pixels

    def _rgb(self, index: int) -> Image.Image:
        path = self.path(index)
        image = opened(path, Path(path))
        return image if image.mode == "RGB" else image.convert("RGB")


def opened(name: str, data: Path | bytes | None) -> Image.Image:
    """The decoded image of a file or of encoded bytes, grey (mode L) or RGB.

    Raises: ValueError naming it if it cannot be read, is null, or has more than 8 bits a channel.
    """
    try:
        if data is None:
            raise ValueError("it is null")
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} is not 8 bits a channel")
            wanted = "L" if image.mode in ("1", "L", "LA") else "RGB"
            if image.mode != wanted:
                return image.convert(wanted)
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable image ({error}); mend or remove it") from error


def boxes(uniform: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float64]:
    """Boxes (top, left, height, width) in images of one size, from uniform numbers `(N, CROP_DRAWS)`.

    8 % to 100 % of the area at a ratio of 3/4 to 4/3: of ten tries the first that fits, else the largest
    central box of a ratio in that range.

    Source: torchvision's RandomResizedCrop, after Szegedy et al., arXiv:1409.4842.
    """
    draws = uniform.astype(np.float64)
    area = height * width * (0.08 + 0.92 * draws[:, :10])
    ratio = np.exp((2 * draws[:, 10:20] - 1) * math.log(4 / 3))
    tries = np.rint(np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2))
    image = np.array([height, width], dtype=np.float64)
    fits = ((tries >= 1) & (tries <= image)).all(axis=2)
    fitting = fits.any(axis=1)[:, None]
    central = np.minimum(image, np.rint([width * 4 / 3, height * 4 / 3]))
    sides = np.where(fitting, tries[np.arange(len(draws)), fits.argmax(axis=1)], central)
    free = image - sides
    corner = np.where(fitting, np.floor(draws[:, 20:] * (free + 1)), free // 2)
    return np.concatenate([corner, sides], axis=1)


def decoded_ahead(
    read: Callable[[int], Pixels],
    batches: Sequence[slice],
    side: int,
    workers: int,
    *,
    pinned: bool = False,
) -> Generator[Tensor, None, None]:
    """Batches of images, uint8 `(B, 3, S, S)`, of which the next ones are decoded while one is in use.

    `read` gives the image of one row of a batch, in any of `workers` threads: what is served depends on
    neither their number nor their order. They live as long as the iterator, also if that is closed or dropped
    midway, and work at most `BATCHES_AHEAD` batches ahead, or `IMAGES_AHEAD` images each if that is more.
    `pinned` is memory from which a GPU copies unattended.

    Raises: whatever `read` raises, when its batch is due.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREAD_NAME)

    def begin(batch: slice) -> tuple[Tensor, list[Future[None]]]:
        images = torch.empty(batch.stop - batch.start, 3, side, side, dtype=torch.uint8, pin_memory=pinned)
        rows = images.numpy()

        def fill(row: int) -> None:
            rows[row - batch.start] = read(row)

        return images, [pool.submit(fill, row) for row in range(batch.start, batch.stop)]

    def finish(images: Tensor, parts: list[Future[None]]) -> Tensor:
        for part in parts:
            part.result()
        return images

    begun: deque[tuple[Tensor, list[Future[None]]]] = deque()
    try:
        for batch in batches:
            begun.append(begin(batch))
            if len(begun) > max(BATCHES_AHEAD, -(-IMAGES_AHEAD * workers // (batch.stop - batch.start))):
                yield finish(*begun.popleft())
        while begun:
            yield finish(*begun.popleft())
    finally:
        # Not waited for: this may run in the garbage collector, and so in one of the threads themselves.
        pool.shutdown(wait=False, cancel_futures=True)


def _channels_first(image: Image.Image) -> Pixels:
    return np.asarray(image).transpose(2, 0, 1)
