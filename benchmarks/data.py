"""How many images a second come ready for training, ours against torchvision with worker processes?

Two cases. *Memory*: images of CIFAR's size, cropped from a border of 4, mirrored, normalised, cutout 16; ours
makes whole batches in this process, torchvision one image at a time in its workers. *Folder*: JPEG files, a
random box scaled to 224 and mirrored; ours decodes in threads, as many as torchvision has workers.

Torchvision runs with the published transforms on PIL images and with its newer ones on tensors, both with
workers that are kept from epoch to epoch and prefetch four batches each. Pillow decodes there too, since the
JPEG decoder of torchvision is deprecated.

    python -m benchmarks.data
    python -m benchmarks.data --data ../cifar10 --folder ../imagenet/train
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from benchmarks.measure import Roofline, Timing, in_turns, parser, prepare, roofline, speedup, table
from nas.data import Arrays, Augment, Data, DataConfig, load
from nas.files import Files, Integers, Pixels, decoded_ahead, opened
from nas.streams import generator

CIFAR = Augment(pad=4, flip=True, cutout=16)
IMAGENET = Augment(flip=True, resized_crop=True)
SIDE = 224
PREFETCHED = 4
HEAD = ("case", "pipeline", "images/s", "ours is faster by", "of the copy roofline")
Form = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both cases and print them as one table."""
    options = _options().parse_args(arguments)
    device = prepare(options)
    peak = roofline(device)
    print(f"{peak}; {options.workers} workers, batches of {options.batch}, {options.rounds} rounds")
    rows = _memory(options, device, peak)
    if options.folder:
        rows += _folder(options, device, peak, Path(options.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), options.files)
            rows += _folder(options, device, peak, Path(folder))
    print(table(HEAD, rows))


def _options() -> argparse.ArgumentParser:
    found = parser(__doc__, rounds=7)
    found.set_defaults(threads=1)
    found.add_argument("--workers", type=int, default=2, help="torchvision's processes, our decoding threads")
    found.add_argument("--batch", type=int, default=64, help="images in a batch (default 64)")
    found.add_argument("--data", help="images in memory, as nas.data names them (default: made up)")
    found.add_argument("--images", type=int, default=20_000, help="how many of them (default 20000)")
    found.add_argument("--folder", help="a folder of classes of image files (default: made-up photographs)")
    found.add_argument("--files", type=int, default=512, help="how many of them (default 512)")
    return found


# --- images in memory ---------------------------------------------------------------------------------------


def _memory(options: argparse.Namespace, device: torch.device, peak: Roofline) -> list[list[str]]:
    config = DataConfig(options.data or "made", valid=0, weights_share=1, limit=options.images)
    arrays = load(config) if options.data else _made_up(options.images)
    assert isinstance(arrays.train_images, np.ndarray)
    data = Data(arrays, config, 0, device)
    forms: dict[str, Form] = {"ours, one process": lambda: _drain(_epoch(data, options.batch, CIFAR))}
    for name, images in {
        "torchvision, PIL images": PilImages(arrays),
        "torchvision, v2 on tensors": TensorImages(arrays),
    }.items():
        forms[name] = _loaded(images, options, device)
    times = in_turns(forms, rounds=options.rounds, device=device)
    return _rows("memory", times, data.size("train"), data.channels * data.image_size**2, peak)


def _made_up(count: int) -> Arrays:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count) % 10
    names = tuple(str(label) for label in range(10))
    return Arrays(images, labels, images[:10], labels[:10], names, "made", "", (0.5,) * 3, (0.25,) * 3)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images in memory as torchvision's CIFAR10 serves them, with the published transforms."""

    def __init__(self, arrays: Arrays) -> None:
        assert isinstance(arrays.train_images, np.ndarray)
        self.pixels = np.ascontiguousarray(arrays.train_images.transpose(0, 2, 3, 1))
        self.labels = arrays.train_labels
        size = self.pixels.shape[1]
        self.recipe = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=CIFAR.pad),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(arrays.mean, arrays.std),
                Cutout(CIFAR.cutout),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        return self.recipe(image), int(self.labels[index])


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images in memory as uint8 tensors, with the second version of torchvision's transforms."""

    def __init__(self, arrays: Arrays) -> None:
        assert isinstance(arrays.train_images, np.ndarray)
        self.pixels = torch.from_numpy(arrays.train_images.copy())
        self.labels = arrays.train_labels
        self.recipe = v2.Compose(
            [
                v2.RandomCrop(self.pixels.shape[2], padding=CIFAR.pad),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(arrays.mean, arrays.std),
                Cutout(CIFAR.cutout),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.recipe(self.pixels[index]), int(self.labels[index])


class Cutout:
    """A square of one image set to 0, where it lies only: cheaper than the published mask, and the same."""

    def __init__(self, length: int) -> None:
        self.half = length // 2

    def __call__(self, image: Tensor) -> Tensor:
        """The image, changed in place."""
        y, x = (int(torch.randint(length, ())) for length in image.shape[1:])
        image[:, max(0, y - self.half) : y + self.half, max(0, x - self.half) : x + self.half] = 0
        return image


# --- image files --------------------------------------------------------------------------------------------


def _folder(
    options: argparse.Namespace, device: torch.device, peak: Roofline, folder: Path
) -> list[list[str]]:
    config = DataConfig(
        str(folder),
        valid=0,
        weights_share=1,
        limit=options.files,
        test_limit=1,
        image_size=SIDE,
        stream=True,
        workers=options.workers,
    )
    arrays = load(config)
    data, files = Data(arrays, config, 0, device), arrays.train_images
    assert isinstance(files, Files)
    forms: dict[str, Form] = {
        f"ours, {options.workers} threads": lambda: _drain(_epoch(data, options.batch, IMAGENET)),
        f"Pillow decoding alone, {options.workers} threads": lambda: _drain(_only_decoded(files, options)),
    }
    normalise = {"mean": arrays.mean, "std": arrays.std}
    from_pil = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(**normalise),
        ]
    )
    from_tensor = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(SIDE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(**normalise),
        ]
    )
    paths = [files.path(index) for index in range(len(files))]
    for name, recipe in (("torchvision, PIL images", from_pil), ("torchvision, v2 on tensors", from_tensor)):
        forms[name] = _loaded(ReadFiles(paths, arrays.train_labels, recipe), options, device)
    times = in_turns(forms, rounds=options.rounds, device=device)
    return _rows("folder", times, data.size("train"), 3 * SIDE**2, peak)


class ReadFiles(Dataset[tuple[Tensor, int]]):
    """Image files as torchvision's ImageFolder serves them."""

    def __init__(self, paths: Sequence[str], labels: Integers, recipe: Callable[[Any], Any]) -> None:
        self.paths, self.labels, self.recipe = paths, labels, recipe

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.recipe(default_loader(self.paths[index])), int(self.labels[index])


def write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of two classes, of the size and about the bytes of ImageNet's."""
    draws = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + draws.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = folder / ("ant", "bee")[index % 2] / f"{index:05}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file, quality=90)


def _only_decoded(files: Files, options: argparse.Namespace) -> Iterator[Tensor]:
    def read(index: int) -> Pixels:
        opened(files.path(index), Path(files.path(index)))
        return np.zeros((3, 1, 1), dtype=np.uint8)

    batches = [slice(start, min(start + 64, len(files))) for start in range(0, len(files), 64)]
    return decoded_ahead(read, batches, 1, options.workers)


# --- both ---------------------------------------------------------------------------------------------------


def _epoch(data: Data, batch: int, augment: Augment) -> Iterator[tuple[Tensor, Tensor]]:
    draws = generator(0, "draws")
    return data.batches("train", batch, order=generator(0, "order"), augment=augment, draws=draws)


def _loaded(images: Dataset[Any], options: argparse.Namespace, device: torch.device) -> Form:
    loader = DataLoader(
        images,
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=True,
        prefetch_factor=PREFETCHED,
        pin_memory=device.type == "cuda",
    )
    return lambda: _drain(tuple(x.to(device, non_blocking=True) for x in batch) for batch in loader)


def _drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def _rows(case: str, times: dict[str, Timing], count: int, numbers: int, peak: Roofline) -> list[list[str]]:
    """Lines of the table; an image is `numbers` floats, which a copy reads and writes once."""
    ours, bound = next(iter(times.values())), peak.bandwidth / (8 * numbers)
    rows = []
    for name, timing in times.items():
        rate = count / timing.median
        ratio = "" if timing is ours else str(speedup(timing, ours))
        rows.append([case, name, f"{rate:.0f}", ratio, f"{rate / bound:.1%}"])
    return rows


if __name__ == "__main__":
    main()
