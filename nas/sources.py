"""Where images come from: named data sets, image folders, Parquet files; each as labels and a reader.

Labels are known before any image is decoded, so a split or a limit costs only the images it keeps. Libraries
that only one source needs are imported where it is opened.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from nas.files import Files, Integers, Pixels, opened

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel, of pixels in [0, 1]."""

NAMED = ("digits", "cifar10", "cifar100", "fashion_mnist")
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
DECODED_AT_ONCE = 256

# The constants of the published recipes (DARTS for CIFAR-10, P-DARTS for CIFAR-100).
PUBLISHED_STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled images whose pixels are read on demand: `read(positions)` is `(len(positions), C, H, W)`."""

    labels: Integers
    read: Callable[[Integers], Pixels]
    files: Files | None = None
    """The images as files, if they are files and `image_size` is set; they may then be streamed."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def take(self, positions: Integers) -> "Rows":
        """The rows at `positions`, in that order, still unread."""
        files = None if self.files is None else self.files.take(positions)
        return Rows(self.labels[positions], lambda chosen: self.read(positions[chosen]), files)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before its images are read; `test` is None where there is no official test part."""

    name: str
    classes: tuple[str, ...]
    train: Rows
    test: Rows | None
    statistics: Statistics | None = None
    """Published normalisation constants; None where they are computed from the training images."""


def open_source(source: str, image_size: int | None, root: str, download: bool) -> Source:
    """The data set of that name or path, with images of `image_size` or, if None, of their stored size.

    Raises: FileNotFoundError for what is neither a name nor a path, or cannot be downloaded; ValueError for
    files that cannot be used.
    """
    if source == "digits":
        return _digits(image_size)
    if source in NAMED:
        return _torchvision(source, image_size, root, download)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"source={source!r} is neither a known data set nor an existing path; use {', '.join(NAMED)}, or "
            "the path of a Parquet file, of a folder holding train.parquet, or of an image folder"
        )
    if path.is_file():
        return _parquet(path.stem, path, None, image_size)
    train, test = path / "train.parquet", path / "test.parquet"
    if train.is_file():
        return _parquet(path.resolve().name, train, test if test.is_file() else None, image_size)
    return _image_folder(path, image_size)


def _digits(image_size: int | None) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # stored as 0..16
    names = tuple(str(name) for name in digits.target_names)
    return Source("digits", names, _in_memory(pixels, digits.target, image_size), None)


def _torchvision(source: str, image_size: int | None, root: str, download: bool) -> Source:
    from torchvision import datasets  # slow to import

    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}[source]
    folder = str(Path(root).expanduser())

    def opened(train: bool) -> Any:
        try:
            return getattr(datasets, kind)(folder, train=train, download=download)
        except (OSError, RuntimeError) as error:
            reason = f"downloading it failed ({error})" if download else "download=False forbids fetching it"
            raise FileNotFoundError(
                f"source={source!r} is not in root={root!r} and {reason}; on a machine with a network run "
                f'python -c "from torchvision.datasets import {kind}; {kind}({folder!r}, download=True)" and '
                "copy that folder here, or give the path of a Parquet file or image folder as source"
            ) from error

    def rows(part: Any) -> Rows:
        pixels = np.asarray(part.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        return _in_memory(pixels, part.targets, image_size)

    train, test = opened(train=True), opened(train=False)
    return Source(source, tuple(train.classes), rows(train), rows(test), PUBLISHED_STATISTICS.get(source))


def _in_memory(pixels: Pixels, labels: npt.ArrayLike, image_size: int | None) -> Rows:
    def read(positions: Integers) -> Pixels:
        chosen = np.ascontiguousarray(pixels[positions])
        if image_size is None or chosen.shape[2:] == (image_size, image_size):
            return chosen
        size = (image_size, image_size)
        resized = F.interpolate(torch.from_numpy(chosen), size=size, mode="bilinear", antialias=True)
        return np.asarray(resized.numpy(), dtype=np.uint8)

    return Rows(np.asarray(labels, dtype=np.int64), read)


# Parquet: columns `image` (encoded bytes, or a struct with a field `bytes`) and `label` (integers).


def _parquet(name: str, train: Path, test: Path | None, image_size: int | None) -> Source:
    labels, names = _parquet_labels(train)
    if names is None:
        found = np.unique(labels)
        if not np.array_equal(found, np.arange(len(found))):
            raise ValueError(
                f"{train} holds labels {found[0]}..{found[-1]} in {len(found)} classes; labels must be "
                "0, 1, ... with none missing: renumber them"
            )
        names = tuple(str(label) for label in found)
    _check_labels(train, labels, names)
    rows = Rows(labels, lambda positions: _parquet_images(train, positions, image_size))
    if test is None:
        return Source(name, names, rows, None)
    test_labels, test_names = _parquet_labels(test)
    if test_names not in (None, names):
        raise ValueError(
            f"{test} names the classes {test_names}, {train} names them {names}; they must be the same"
        )
    _check_labels(test, test_labels, names)
    test_rows = Rows(test_labels, lambda positions: _parquet_images(test, positions, image_size))
    return Source(name, names, rows, test_rows)


def _parquet_labels(path: Path) -> tuple[Integers, tuple[str, ...] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = file.read(columns=["label"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({error}); write it again or give another source"
        ) from error
    if missing := [name for name in ("image", "label") if name not in schema.names]:
        raise ValueError(
            f"{path} has no column {' or '.join(missing)}, only {', '.join(schema.names)}; rename them: "
            "image holds encoded bytes (or a struct with a field bytes), label integers"
        )
    column = columns["label"]
    if not pa.types.is_integer(column.type) or column.null_count:
        nulls = f" with {column.null_count} nulls" if column.null_count else ""
        raise ValueError(
            f"{path} holds labels of type {column.type}{nulls}; store integers 0..classes-1, none null"
        )
    if len(column) == 0:
        raise ValueError(f"{path} holds no rows; give a source with images")
    image = schema.field("image").type
    with_bytes = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    stored = image.field("bytes").type if with_bytes else image
    if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise ValueError(
            f"{path} holds images of type {image}; store encoded bytes, or a struct with a field bytes"
        )
    return column.to_numpy().astype(np.int64), _class_names(schema.metadata or {})


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """Class names from the key `class_names`, or from the features that Hugging Face `datasets` writes."""
    if b"class_names" in metadata:
        return tuple(name.strip() for name in metadata[b"class_names"].decode().split(","))
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    return None if names is None else tuple(names)


def _parquet_images(path: Path, positions: Integers, image_size: int | None) -> Pixels:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded: dict[int, bytes | None] = {}
    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            wanted = np.sort(positions[(positions >= start) & (positions < stop)])
            if len(wanted):
                column = file.read_row_group(group, columns=["image"])["image"].take(pa.array(wanted - start))
                values = column.to_pylist()
                if pa.types.is_struct(column.type):
                    values = [value and value["bytes"] for value in values]
                encoded.update(zip(wanted.tolist(), values, strict=True))
            start = stop
    return _decoded([(f"{path} row {row}", encoded[row]) for row in positions.tolist()], image_size)


# Image folders: one subfolder a class, or train/ and test/ (else val/) with one subfolder a class each.


def _image_folder(path: Path, image_size: int | None) -> Source:
    # A folder `train` without subfolders is a class of that name, not a part.
    train = path / "train" if (path / "train").is_dir() and _subfolders(path / "train") else path
    names = tuple(folder.name for folder in _subfolders(train))
    if not names:
        raise ValueError(
            f"{path} holds neither train.parquet nor subfolders of classes; arrange it as class/image.png, "
            "as train/class/image.png and test/class/image.png, or as train.parquet and test.parquet"
        )
    test = next((path / part for part in ("test", "val") if (path / part).is_dir() and train != path), None)
    test_rows = None if test is None else _folder_rows(test, names, image_size)
    return Source(path.resolve().name, names, _folder_rows(train, names, image_size), test_rows)


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _folder_rows(path: Path, names: tuple[str, ...], image_size: int | None) -> Rows:
    if unknown := [folder.name for folder in _subfolders(path) if folder.name not in names]:
        raise ValueError(
            f"{path} holds the class {unknown[0]!r} that the training part lacks; it has {', '.join(names)}"
        )
    path = path.absolute()  # other processes may read the files, from elsewhere
    below = len(os.path.join(path, ""))
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [
            os.path.join(folder, file)[below:]
            for folder, _, entries in os.walk(path / name)
            for file in entries
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
        ]
        files += sorted(found, key=lambda file: file.split(os.sep))
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"{path} holds no image; files must end in one of {', '.join(sorted(IMAGE_SUFFIXES))}"
        )

    def read(positions: Integers) -> Pixels:
        chosen = [path / files[index] for index in positions.tolist()]
        return _decoded([(str(file), file) for file in chosen], image_size)

    streamed = None
    if image_size is not None:
        streamed = Files(str(path), np.array([os.fsencode(file) for file in files]), image_size)
    return Rows(np.array(labels, dtype=np.int64), read, streamed)


def _check_labels(path: Path, labels: Integers, names: tuple[str, ...]) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise ValueError(
            f"{path} row {outside[0]} holds label={labels[outside[0]]}, outside 0..{len(names) - 1} for the "
            f"{len(names)} classes; correct the label or name every class in the schema metadata"
        )


# Decoding, the same for files and for bytes.


def _decoded(items: Sequence[tuple[str, Path | bytes | None]], image_size: int | None) -> Pixels:
    """Decode named images in threads (Pillow releases the GIL): one channel if all are grey, else three."""
    name, data = items[0]
    height, width = _pixels(name, data, image_size).shape[:2]
    needed, memory = 3 * len(items) * height * width, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"{len(items)} images of {height}x{width} take {needed / 1e9:.0f} GB, and this machine has "
            f"{memory / 1e9:.0f} GB; set stream=True (image folders), a limit, or a smaller image_size"
        )
    images = np.empty((len(items), 3, height, width), dtype=np.uint8)

    def decode(start: int) -> bool:
        any_colour = False
        for index in range(start, min(start + DECODED_AT_ONCE, len(items))):
            name, data = items[index]
            pixels = _pixels(name, data, image_size)
            if pixels.shape[:2] != (height, width):
                raise ValueError(
                    f"{name} is {pixels.shape[0]}x{pixels.shape[1]}, the first {height}x{width}; images "
                    "must be of one size: set image_size to resize them"
                )
            any_colour |= pixels.ndim == 3
            images[index] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        return any_colour

    with ThreadPoolExecutor() as pool:
        colour = list(pool.map(decode, range(0, len(items), DECODED_AT_ONCE)))
    return images if any(colour) else images[:, :1].copy()


def _pixels(name: str, data: Path | bytes | None, image_size: int | None) -> npt.NDArray[np.uint8]:
    """One image as `(H, W)` if grey, else `(H, W, 3)`; scaled and cropped to `image_size` if given."""
    plain = opened(name, data)
    if image_size is not None and plain.size != (image_size, image_size):
        plain = ImageOps.fit(plain, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(plain)
