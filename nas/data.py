"""Image data sets: loading and splitting them, and serving augmented batches from device memory.

`load(config)` reads a data set once into read-only arrays, which trials may share; `Data` splits them by seed
and serves batches. Images stay uint8 until their batch is made, and a whole batch is augmented at once. Image
folders that do not fit in memory are streamed: only the names of their files are held and shared.
"""

import hashlib
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nas.files import CROP_DRAWS, Files, Integers, Names, Pixels, boxes, decoded_ahead
from nas.sources import Rows, Source, Statistics, open_source
from nas.streams import generator

Drawn = dict[str, Tensor]
"""Random numbers of an epoch by what they decide, one row an image."""
Served = Generator[Tensor, None, None]
Part = Literal["weights", "arch", "train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
SAMPLED = 1024
"""Streamed images of which mean and deviation are taken."""


@dataclass(frozen=True)
class DataConfig:
    """Which images a trial sees, and how they are split. The seed moves the split, never the test part."""

    source: str = "digits"
    """digits, cifar10, cifar100 or fashion_mnist; or the path of a Parquet file (columns image and label), of
    a folder holding train.parquet and perhaps test.parquet, or of an image folder: one subfolder a class,
    perhaps below train/ and test/ (else val/). A source stored class by class is put into one fixed random
    order."""
    valid: float = 0.2
    """Fraction of the training images held out of search and training."""
    test: float = 0.2
    """Fraction of the images that become the test part where there is no official one; without effect
    elsewhere. The choice belongs to the data set, not to the seed."""
    weights_share: float = 0.5
    """Fraction of what `valid` leaves that trains network weights; the rest trains the architecture."""
    search_share: float = 1.0
    """Fraction of what `valid` leaves that the search sees at all, `weights_share` being a share of it;
    retraining uses everything. PC-DARTS searches ImageNet on an eighth."""
    shuffle: bool = True
    """Split at random, stratified by class; else in stored order (weights, arch, valid), as DARTS does."""
    limit: int | None = None
    """Most training images to use, valid included: a stratified random subset, the same for every seed."""
    test_limit: int | None = None
    """Most test images to use; None for all."""
    image_size: int | None = None
    """Side in pixels to which images are scaled (of files the shorter side, then the centre is kept); None
    keeps their size, which must then be one and square."""
    stream: bool = False
    """Decode the files of an image folder when their batch is due, for folders that do not fit in memory.
    `resized_crop` then cuts from the whole image; otherwise the shorter side is scaled to 8/7 of `image_size`
    and the centre kept, as published for ImageNet. All images are RGB."""
    workers: int | None = None
    """Threads that decode streamed images, without effect on what they give; None for as many as PyTorch has,
    which are the cores of the trial in a study."""
    download: bool = True
    """Fetch a named data set that `root` lacks."""
    root: str = "~/.cache/nas-data"
    """Folder of downloaded data sets."""

    def __post_init__(self) -> None:
        """Raise ValueError for fractions or counts outside their range."""
        if not 0 <= self.valid < 1:
            raise ValueError(f"valid={self.valid} must be in [0, 1); use 0 for no held-out images")
        if not 0 < self.test < 1:
            raise ValueError(
                f"test={self.test} must be in (0, 1), e.g. 0.2: every trial is measured on test images"
            )
        if not 0 < self.weights_share <= 1:
            raise ValueError(
                f"weights_share={self.weights_share} must be in (0, 1]; use 1 for methods that learn no "
                "architecture parameters"
            )
        if not 0 < self.search_share <= 1:
            raise ValueError(
                f"search_share={self.search_share} must be in (0, 1]; use 1 to search on all images"
            )
        for name in ("limit", "test_limit", "image_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; use None for no {name}")


@dataclass(frozen=True)
class Augment:
    """Random changes to training images: crop, flip, colour jitter, then (after normalisation) cutout.

    Source: DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    arXiv:1708.04552; the CIFAR and ImageNet recipes of DARTS, PC-DARTS and P-DARTS.
    """

    pad: int = 0
    """Width of the black border with which an image is cropped back to its size, at one of (2 pad + 1)^2
    offsets."""
    flip: bool = False
    """Mirror left to right with probability 0.5."""
    cutout: int = 0
    """Side of a square set to 0, its centre uniform over the image, clipped at borders. It reaches half the
    side, rounded down, either way: an odd side acts as the even one below it, as in the authors' code."""
    resized_crop: bool = False
    """Crop 8 % to 100 % of the area at a ratio of 3/4 to 4/3 and scale it back, bilinear, to full size."""
    jitter: tuple[float, float, float, float] | None = None
    """Strengths of brightness, contrast, saturation (factor 1 ± strength) and hue (± turns), applied in this
    order. Differs from torchvision, which shuffles the order for each image."""

    def __post_init__(self) -> None:
        """Raise ValueError for negative sizes, strengths outside their range, or two crops at once."""
        for name in ("pad", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; use 0 for no {name}")
        if self.pad and self.resized_crop:
            raise ValueError(
                f"pad={self.pad} and resized_crop=True are two crops; set pad=0 or resized_crop=False"
            )
        if self.jitter is not None:
            *factors, hue = self.jitter
            if len(factors) != 3 or not all(0 <= factor <= 1 for factor in factors) or not 0 <= hue <= 0.5:
                raise ValueError(
                    f"jitter={self.jitter} must be (brightness, contrast, saturation, hue), the first three "
                    "in [0, 1] and hue in [0, 0.5]; use None for no jitter"
                )


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory, read-only: numpy arrays, of which Ray keeps one copy per node for all trials."""

    train_images: Pixels | Files
    """uint8 `(N, C, H, W)`; if streamed, the files of which they are decoded."""
    train_labels: Integers
    """int64 `(N,)`, 0..classes-1."""
    test_images: Pixels | Files
    test_labels: Integers
    classes: tuple[str, ...]
    name: str
    sha256: str
    """Digest of the four arrays and their shapes; if streamed, of the files' names and sizes in bytes instead
    of their pixels, and of the size images are brought to."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]: published for cifar10 and cifar100, else of the training images, or,
    if streamed, of 1024 of them, the same for every seed."""
    std: tuple[float, ...]


def load(config: DataConfig) -> Arrays:
    """The data set of `config`, the same for every seed; no more images are decoded than its limits keep.

    Raises: FileNotFoundError for an unknown source or one that cannot be fetched; ValueError for images or
    labels that cannot be used, or too few of them.
    """
    _check_stream(config)
    source = open_source(config.source, config.image_size, config.root, config.download)
    train, test = _train_and_test(source, config)
    train = _limited(train, config.limit, "limit")
    test = _limited(test, config.test_limit, "test_limit")
    if missing := set(range(len(source.classes))) - set(train.labels.tolist()):
        raise ValueError(
            f"{source.name} has no training image of class {source.classes[min(missing)]!r} among "
            f"{len(train)} at limit={config.limit}; add images, raise limit, or remove the class"
        )
    if config.stream:
        return _streamed(source, train, test, config)
    train_images, test_images = _alike(_read(train), _read(test), source.name)
    mean, std = source.statistics or _statistics(train_images)
    arrays = (train_images, train.labels, test_images, test.labels)
    for array in arrays:
        array.setflags(write=False)
    return Arrays(*arrays, source.classes, source.name, _sha256(*arrays), mean, std)


class Data:
    """A data set split for one trial and held on its device; the only place where the test part is served."""

    def __init__(self, arrays: Arrays, config: DataConfig, seed: int, device: torch.device) -> None:
        self.classes = len(arrays.classes)
        self.channels, self.image_size = arrays.train_images.shape[1:3]
        self.sha256 = arrays.sha256
        self.device = device
        self.parts: dict[Part, Tensor] = _split(arrays, config, seed)
        self.workers = config.workers or torch.get_num_threads()
        self._train = self._held(arrays.train_images), _shared(arrays.train_labels).to(device)
        self._test = self._held(arrays.test_images), _shared(arrays.test_labels).to(device)
        mean, std = torch.tensor([arrays.mean, arrays.std], dtype=torch.float64).view(2, -1, 1, 1)
        self._scale = (1 / (255 * std)).float().to(device)
        self._shift = (-mean / std).float().to(device)

    def size(self, part: Part) -> int:
        """Number of images in a part."""
        return len(self.parts[part])

    def batches(
        self,
        part: Part,
        batch_size: int,
        *,
        order: torch.Generator | None,
        augment: Augment | None = None,
        draws: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of images, normalised float32 `(B, C, H, W)`, and labels, int64 `(B,)`, on the device.

        Images come in stored order if `order` is None. All that is random is drawn at this call, from the CPU
        generators `order` and `draws`, so it depends on neither the device nor the batch size. The last batch
        may be smaller; a single image left over joins the one before it, since batch norm cannot train on it.
        Streamed images are decoded ahead by threads that end with the iterator.

        Raises: ValueError for an empty or unknown part, for an augmentation without draws or that does not
        fit the images, and, when its batch is due, for a streamed file that cannot be decoded.
        """
        if part not in PARTS:
            raise ValueError(f"part={part!r} is unknown; use one of {', '.join(PARTS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        indices = self.parts[part]
        if len(indices) == 0:
            raise ValueError(
                f"part={part!r} is empty; set valid above 0 for valid, weights_share below 1 for arch"
            )
        drawn = None
        if augment is not None:
            self.check(augment)
            if draws is None:
                raise ValueError("augment needs draws; pass a generator of nas.streams, or augment=None")
            drawn = draw(augment, len(indices), self.image_size, draws)
        if order is not None:
            indices = indices[torch.randperm(len(indices), generator=order)]
        return self._serve(part, indices, batch_size, augment, drawn or {})

    def _serve(
        self,
        part: Part,
        indices: Tensor,
        batch_size: int,
        augment: Augment | None,
        drawn: Drawn,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._test if part == "test" else self._train
        starts = [*range(0, len(indices), batch_size), len(indices)]
        if len(starts) > 2 and starts[-1] - starts[-2] == 1 < batch_size:
            del starts[-2]
        batches = [slice(start, end) for start, end in pairwise(starts)]
        if isinstance(images, Files):
            read = self._decoded(images, indices, batches, drawn)
        else:
            read = self._selected(images, indices, batches, drawn)
        with closing(read):  # a reader of files has threads to end
            indices = self._moved(indices)
            drawn = {name: self._moved(values) for name, values in drawn.items() if name != "crop"}
            for batch, x in zip(batches, read, strict=True):
                if augment is None:
                    x = self._normalised(x)
                else:
                    x = self._augmented(x, augment, {name: values[batch] for name, values in drawn.items()})
                yield x, labels.index_select(0, indices[batch])

    def _selected(self, images: Tensor, indices: Tensor, batches: Sequence[slice], drawn: Drawn) -> Served:
        """Batches of images in memory, their random box cut if one was drawn."""
        indices = self._moved(indices)
        if "crop" not in drawn:
            yield from (images.index_select(0, indices[batch]) for batch in batches)
            return
        box = torch.from_numpy(boxes(drawn["crop"].numpy(), self.image_size, self.image_size)).float()
        box, flip = self._moved(box), self._moved(drawn["flip"])
        for batch in batches:
            yield resized_crop(images.index_select(0, indices[batch]), box[batch], flip[batch])

    def _decoded(self, files: Files, indices: Tensor, batches: Sequence[slice], drawn: Drawn) -> Served:
        """Batches of files, their random box cut by the thread that decodes them if one was drawn."""
        chosen = indices.numpy()

        def read(row: int) -> Pixels:
            if "crop" not in drawn:
                return files.whole(chosen[row])
            return files.cropped(chosen[row], drawn["crop"][row].numpy(), bool(drawn["flip"][row]))

        pinned = self.device.type == "cuda"
        with closing(decoded_ahead(read, batches, files.side, self.workers, pinned=pinned)) as decoded:
            for images in decoded:
                yield images.to(self.device, non_blocking=True)

    def _augmented(self, x: Tensor, augment: Augment, drawn: Drawn) -> Tensor:
        """Everything but the box of a random crop: that is cut where images are read."""
        if not augment.resized_crop and (augment.pad or augment.flip):
            x = padded_crop(x, augment.pad, drawn["offset"], drawn["flip"])
        if augment.jitter is not None:
            x = jittered(x / 255, drawn["jitter"]) * 255
        x = self._normalised(x)
        return cut_out(x, augment.cutout, drawn["centre"]) if augment.cutout else x

    def _normalised(self, x: Tensor) -> Tensor:
        return x.float().mul_(self._scale).add_(self._shift)  # (pixel / 255 - mean) / std

    def check(self, augment: Augment) -> None:
        """Raise ValueError for an augmentation that these images do not allow."""
        for name, size in (("pad", augment.pad), ("cutout", augment.cutout)):
            if size > self.image_size:
                raise ValueError(f"{name}={size} exceeds the image size {self.image_size}; use a smaller one")
        if augment.jitter is not None and self.channels != 3:
            raise ValueError(
                f"jitter needs 3 colour channels, these images have {self.channels}; use jitter=None"
            )

    def _held(self, images: Pixels | Files) -> Tensor | Files:
        return images if isinstance(images, Files) else _shared(images).to(self.device)

    def _moved(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":
            values = values.pin_memory()  # only from there the copy does not wait for work already queued
        return values.to(self.device, non_blocking=True)


def stratified(labels: Integers, count: int, stream: torch.Generator) -> Integers:
    """Positions, ascending, of `count` labels drawn so that each class keeps its share to within one image.

    Images beyond the whole shares go to the classes with the largest remainders.
    """
    sizes = np.bincount(labels)
    takes, remainders = np.divmod(sizes * count, max(len(labels), 1))
    takes[np.argsort(-remainders, kind="stable")[: count - takes.sum()]] += 1
    order = torch.randperm(len(labels), generator=stream).numpy()
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[by_class]]
    return np.sort(by_class[rank < takes[labels[by_class]]])


def _split(arrays: Arrays, config: DataConfig, seed: int) -> dict[Part, Tensor]:
    labels = arrays.train_labels
    valid_size = round(config.valid * len(labels))
    search_size = round(config.search_share * (len(labels) - valid_size))
    weights_size = round(config.weights_share * search_size)
    order = np.arange(len(labels))
    if config.shuffle:
        stream = generator(seed, "split")
        valid = stratified(labels, valid_size, stream)
        train = np.delete(order, valid)
        seen = train if search_size == len(train) else train[stratified(labels[train], search_size, stream)]
        chosen = stratified(labels[seen], weights_size, stream)
        weights, arch = seen[chosen], np.delete(seen, chosen)
    else:
        train, valid = np.split(order, [len(labels) - valid_size])
        weights, arch, _ = np.split(train, [weights_size, search_size])
    wanted = {"weights": True, "arch": config.weights_share < 1, "valid": config.valid > 0}
    parts: dict[Part, Integers] = {"weights": weights, "arch": arch, "train": train, "valid": valid}
    if any(wanted.get(part) and len(indices) == 0 for part, indices in parts.items()):
        raise ValueError(
            f"{len(labels)} training images at valid={config.valid}, weights_share={config.weights_share} "
            f"split into weights {len(weights)}, arch {len(arch)}, valid {len(valid)}; none may be empty: "
            "raise limit, or use valid=0 or weights_share=1 for no such part"
        )
    parts["test"] = np.arange(len(arrays.test_labels))
    return {part: torch.from_numpy(indices) for part, indices in parts.items()}


def _shared(array: Pixels | Integers) -> Tensor:
    """Tensor on the memory of a read-only array; nothing here writes in place to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


# Steps of load.


def _check_stream(config: DataConfig) -> None:
    # Not in DataConfig: settings are changed one by one, and these two only make sense together.
    if config.stream and config.image_size is None:
        raise ValueError("stream=True needs the size images are brought to; set image_size, e.g. 224")
    if config.workers is not None and not config.stream:
        raise ValueError(f"workers={config.workers} decode streamed images; set stream=True or workers=None")


def _train_and_test(source: Source, config: DataConfig) -> tuple[Rows, Rows]:
    train = _mixed(source.train)
    if source.test is not None:
        return train, _mixed(source.test)
    count = round(config.test * len(train))
    if not 0 < count < len(train):
        raise ValueError(
            f"test={config.test} of {len(train)} images leaves {len(train) - count} to train on and {count} "
            "to test; neither may be empty: add images or change test"
        )
    chosen = stratified(train.labels, count, generator(0, "data", "test"))
    return train.take(np.delete(np.arange(len(train)), chosen)), train.take(chosen)


def _mixed(rows: Rows) -> Rows:
    if np.count_nonzero(np.diff(rows.labels)) >= len(np.unique(rows.labels)):
        return rows
    # Stored class by class, as every image folder is: whole classes would fall into one part or batch.
    return rows.take(torch.randperm(len(rows), generator=generator(0, "data", "order")).numpy())


def _limited(rows: Rows, limit: int | None, name: str) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return rows.take(stratified(rows.labels, limit, generator(0, "data", name)))


def _read(rows: Rows) -> Pixels:
    return rows.read(np.arange(len(rows)))


def _alike(train: Pixels, test: Pixels, name: str) -> tuple[Pixels, Pixels]:
    """Both parts with one number of channels (grey repeated if the other has colour); sizes must agree."""
    if train.shape[2:] != test.shape[2:] or train.shape[2] != train.shape[3]:
        sizes = [f"{images.shape[2]}x{images.shape[3]}" for images in (train, test)]
        raise ValueError(
            f"{name} holds training images of {sizes[0]} and test images of {sizes[1]}; images must be "
            "square and of one size: set image_size to resize them"
        )
    channels = max(train.shape[1], test.shape[1])
    train, test = (x if x.shape[1] == channels else np.repeat(x, channels, axis=1) for x in (train, test))
    return train, test


def _streamed(source: Source, train: Rows, test: Rows, config: DataConfig) -> Arrays:
    if train.files is None or test.files is None:
        raise ValueError(
            f"stream=True decodes the files of an image folder, and source={config.source!r} is none; use "
            "stream=False, or write the images as files, one subfolder a class"
        )
    workers = config.workers or torch.get_num_threads()
    names, sizes = [], []
    for rows in (train.files, test.files):
        names.append(rows.names)
        sizes.append(rows.sizes(workers))
    arrays = (names[0], train.labels, names[1], test.labels)
    for array in arrays:
        array.setflags(write=False)
    sha256 = _sha256(*arrays, *sizes, np.array(train.files.shape[1:]))
    mean, std = _statistics(_sample(train.files, workers))
    return Arrays(
        train.files, train.labels, test.files, test.labels, source.classes, source.name, sha256, mean, std
    )


def _sample(files: Files, workers: int) -> Pixels:
    chosen = torch.randperm(len(files), generator=generator(0, "data", "statistics"))[:SAMPLED].numpy()
    batches = [slice(start, min(start + 64, len(chosen))) for start in range(0, len(chosen), 64)]
    decoded = decoded_ahead(lambda row: files.whole(chosen[row]), batches, files.side, workers)
    return np.concatenate([images.numpy() for images in decoded])


def _statistics(images: Pixels) -> Statistics:
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = np.bincount(images[:, channel].ravel(), minlength=256) / images[:, channel].size
        mean = float(share @ levels)
        means.append(mean)
        # A channel that never varies is only centred.
        stds.append(math.sqrt(float(share @ (levels - mean) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


def _sha256(*arrays: Pixels | Integers | Names) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# Augmentation: what is drawn for an epoch, and what a batch does with it.


def draw(augment: Augment, count: int, size: int, draws: torch.Generator) -> Drawn:
    """All random numbers of an epoch of `count` images of side `size`, one row an image.

    Crop, flip and cutout take the same numbers whether used or not: switching one leaves the others unmoved.
    """
    uniform = torch.rand(count, 5, generator=draws)
    drawn = {
        "offset": (uniform[:, :2] * (2 * augment.pad + 1)).long(),
        "flip": (uniform[:, 2] < 0.5) & augment.flip,
        "centre": (uniform[:, 3:] * size).long(),
    }
    if augment.resized_crop:
        drawn["crop"] = torch.rand(count, CROP_DRAWS, generator=draws)  # a box once the image's size is known
    if augment.jitter is not None:
        change = (2 * torch.rand(count, 4, generator=draws) - 1) * torch.tensor(augment.jitter)
        drawn["jitter"] = torch.tensor([1.0, 1.0, 1.0, 0.0]) + change
    return drawn


def padded_crop(images: Tensor, pad: int, offset: Tensor, flip: Tensor) -> Tensor:
    """Images `(B, C, S, S)` padded with 0, cropped back at `offset` `(B, 2)`, mirrored where `flip`."""
    batch, channels, size, _ = images.shape
    steps = torch.arange(size, device=images.device)
    rows = offset[:, :1] + steps
    columns = offset[:, 1:] + torch.where(flip[:, None], steps.flip(0), steps)
    pixels = rows[:, :, None] * (size + 2 * pad) + columns[:, None, :]
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view_as(images)


def resized_crop(images: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """Boxes `(B, 4)` of images `(B, C, S, S)` scaled back to full size, bilinear, mirrored where `flip`."""
    corner, sides = box[:, :2].flip(1), box[:, 2:].flip(1)  # each (x, y)
    scale = sides / images.shape[2]
    centre = (2 * corner + sides) / images.shape[2] - 1  # of an image that spans [-1, 1]
    mirror = torch.stack([1 - 2 * flip.float(), torch.ones_like(scale[:, 1])], dim=1)
    theta = torch.cat([torch.diag_embed(scale * mirror), centre[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def cut_out(images: Tensor, size: int, centre: Tensor) -> Tensor:
    """Images `(B, C, S, S)` with a square around `centre` `(B, 2)` set to 0, in place."""
    distance = torch.arange(images.shape[2], device=images.device) - centre[:, :, None]
    # Floats: products of masks of several types take PyTorch several times as long on a CPU.
    outside = ((distance < -(size // 2)) | (distance >= size // 2)).float()
    return images.mul_(torch.maximum(outside[:, 0, :, None], outside[:, 1, None, :])[:, None])


def jittered(x: Tensor, factors: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1], changed by `factors` `(B, 4)` in the order of `Augment.jitter`."""
    brightness, contrast, saturation, turn = factors.T[:, :, None, None, None]
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
    x = torch.lerp(_grey(x), x, saturation).clamp(0, 1)
    red, green, blue = x.chunk(3, dim=1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    blue_or_green = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    hue = torch.where(value == red, (green - blue) / safe, blue_or_green) + 6 * turn  # in sixths of a turn
    position = (hue + 5 - 2 * torch.arange(3, device=x.device).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(position, 4 - position).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.chunk(3, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue
