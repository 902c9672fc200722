"""Streamed images: the pixels of torchvision's recipes, decoded ahead, whatever the threads do."""

import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as vision

from nas.data import PARTS, Arrays, Augment, Data, DataConfig, load
from nas.files import BATCHES_AHEAD, CROP_DRAWS, THREAD_NAME, Files, boxes, decoded_ahead
from nas.streams import generator

CPU = torch.device("cpu")
SIDE = 28  # a whole number of 8/7
CROP = Augment(flip=True, resized_crop=True, cutout=6, jitter=(0.4, 0.4, 0.4, 0.1))


def picture(height: int, width: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder: Path, count: int = 24, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """JPEG files of many shapes below train/, and a quarter as many below val/."""
    for part, number in (("train", count), ("val", count // 4)):
        for index in range(number):
            file = folder / part / classes[index % len(classes)] / f"{index:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(30 + index % 7, 34 - index % 5, index).save(file, quality=95)
    return folder


def streamed(folder: Path, **options: object) -> DataConfig:
    return DataConfig(str(folder), **{"stream": True, "image_size": SIDE, "valid": 0.25, **options})


def files_of(folder: Path, images: list[Image.Image], side: int = SIDE) -> Files:
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return Files(str(folder), np.array([f"{index}.png".encode() for index in range(len(images))]), side)


def epoch(data: Data, batch_size: int = 5, augment: Augment | None = CROP) -> list[tuple[Tensor, Tensor]]:
    options = {"order": generator(0, "order"), "augment": augment, "draws": generator(0, "draws")}
    return list(data.batches("train", batch_size, **options))


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.fixture(autouse=True)
def no_thread_outlives_its_iterator() -> Iterator[None]:
    assert not decoders()
    yield
    if decoders():
        gc.collect()
    for thread in decoders():
        thread.join(timeout=10)
    assert not decoders()


# One image.

SHAPES = [(40, 60), (60, 40), (37, 53), (53, 37), (32, 32), (28, 28), (11, 90), (90, 11), (12, 9), (45, 46)]


def test_whole_images_are_those_of_torchvision_bit_for_bit(tmp_path: Path) -> None:
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(SHAPES)]
    files = files_of(tmp_path, images)
    theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(SIDE)])
    for index, image in enumerate(images):
        assert np.array_equal(files.whole(index), vision.pil_to_tensor(theirs(image)))


def test_the_published_evaluation_scales_to_256_for_224() -> None:
    assert round(224 * 8 / 7) == 256


def test_cropped_images_are_those_of_torchvision_bit_for_bit(tmp_path: Path) -> None:
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(SHAPES)]
    files = files_of(tmp_path, images)
    uniform = np.random.default_rng(0).random((len(images), CROP_DRAWS), dtype=np.float32)
    for index, image in enumerate(images):
        box = boxes(uniform[index : index + 1], image.height, image.width)[0].astype(int).tolist()
        expected = vision.resized_crop(image, *box, [SIDE, SIDE])
        assert np.array_equal(files.cropped(index, uniform[index], False), vision.pil_to_tensor(expected))
        mirrored = vision.pil_to_tensor(vision.hflip(expected))
        assert np.array_equal(files.cropped(index, uniform[index], True), mirrored)


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 9), (9, 1), (1, 1)])
def test_images_that_no_try_fits_are_cropped_in_the_centre_as_torchvision_does(
    height: int, width: int
) -> None:
    theirs = transforms.RandomResizedCrop.get_params(
        torch.zeros(3, height, width),
        [5.0, 5.0],
        [3 / 4, 4 / 3],  # areas that never fit
    )
    uniform = np.full((1, CROP_DRAWS), 0.999, dtype=np.float32)  # the largest areas, widest ratio
    assert boxes(uniform, height, width)[0].tolist() == list(theirs)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    colour = picture(40, 40, 0)
    files = files_of(tmp_path, [colour.convert("L"), colour.convert("RGBA"), colour.convert("P")])
    grey = files.whole(0)
    assert grey.shape == (3, SIDE, SIDE)
    assert np.array_equal(grey[0], grey[1])
    assert np.array_equal(grey[0], grey[2])
    assert [files.whole(index).shape[0] for index in (1, 2)] == [3, 3]


# Batches.


def test_streamed_batches_are_the_files_at_their_places_with_their_labels(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    data = Data(arrays, streamed(tmp_path), 0, CPU)
    assert isinstance(arrays.train_images, Files)
    assert isinstance(arrays.test_images, Files)
    assert (data.channels, data.image_size, data.classes) == (3, SIDE, 2)
    for part in PARTS:
        files, all_labels = arrays.train_images, arrays.train_labels
        if part == "test":
            files, all_labels = arrays.test_images, arrays.test_labels
        images, labels = map(torch.cat, zip(*data.batches(part, 4, order=None), strict=True))
        mean, std = (np.array(values)[:, None, None] for values in (arrays.mean, arrays.std))
        for image, label, index in zip(images, labels, data.parts[part].tolist(), strict=True):
            np.testing.assert_allclose(image, (files.whole(index) / 255 - mean) / std, atol=1e-5)
            assert ("ant", "bee")[label] == Path(files.path(index)).parent.name
            assert label == all_labels[index]


def test_what_follows_the_decoding_is_that_of_images_in_memory(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    held = []
    for files in (arrays.train_images, arrays.test_images):
        assert isinstance(files, Files)
        held.append(np.stack([files.whole(index) for index in range(len(files))]))
    in_memory = replace(arrays, train_images=held[0], test_images=held[1])
    for augment in (None, Augment(pad=4, flip=True, cutout=6, jitter=(0.4, 0.4, 0.4, 0.2))):
        found = epoch(Data(arrays, streamed(tmp_path), 0, CPU), augment=augment)
        expected = epoch(Data(in_memory, streamed(tmp_path), 0, CPU), augment=augment)
        for (x, y), (expected_x, expected_y) in zip(found, expected, strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


def test_a_random_crop_is_cut_from_the_original_and_mirrored_by_the_same_draws(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    data = Data(arrays, streamed(tmp_path), 0, CPU)
    assert isinstance(arrays.train_images, Files)
    augment = Augment(flip=True, resized_crop=True)
    found, _ = map(torch.cat, zip(*epoch(data, augment=augment), strict=True))
    draws, count = generator(0, "draws"), data.size("train")
    flip = torch.rand(count, 5, generator=draws)[:, 2] < 0.5
    uniform = torch.rand(count, CROP_DRAWS, generator=draws).numpy()
    order = data.parts["train"][torch.randperm(count, generator=generator(0, "order"))]
    mean, std = (np.array(values)[:, None, None] for values in (arrays.mean, arrays.std))
    assert 0 < flip.sum() < count
    for row, index in enumerate(order.tolist()):
        expected = arrays.train_images.cropped(index, uniform[row], bool(flip[row]))
        np.testing.assert_allclose(found[row], (expected / 255 - mean) / std, atol=1e-5)


def test_neither_the_threads_nor_the_batch_size_change_what_is_served(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    expected = map(torch.cat, zip(*epoch(Data(arrays, streamed(tmp_path, workers=1), 0, CPU)), strict=True))
    images, labels = expected
    for workers, batch_size in ((2, 5), (7, 5), (3, 4), (1, 100)):
        data = Data(arrays, streamed(tmp_path, workers=workers), 0, CPU)
        served = map(torch.cat, zip(*epoch(data, batch_size), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(served, (images, labels), strict=True))
    other = streamed(tmp_path, workers=2)
    assert load(other).sha256 == arrays.sha256
    assert load(other).mean == arrays.mean


def test_threads_are_as_many_as_pytorch_has_unless_set(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    assert Data(arrays, streamed(tmp_path), 0, CPU).workers == torch.get_num_threads()
    assert Data(arrays, streamed(tmp_path, workers=3), 0, CPU).workers == 3


# Decoding ahead.


def numbered(row: int) -> np.ndarray:
    return np.full((3, 2, 2), row, dtype=np.uint8)


BATCHES = [slice(start, start + 4) for start in range(0, 40, 4)]


def test_batches_come_in_order_though_their_images_finish_in_any() -> None:
    def read(row: int) -> np.ndarray:
        time.sleep((row * 7 % 5) / 1000)
        return numbered(row)

    served = torch.cat(list(decoded_ahead(read, BATCHES, 2, 3)))
    assert served[:, 0, 0, 0].tolist() == list(range(40))


@pytest.mark.parametrize(("workers", "ahead"), [(1, BATCHES_AHEAD), (3, BATCHES_AHEAD), (6, 3)])
def test_the_next_batches_and_no_more_are_decoded_while_one_is_in_use(workers: int, ahead: int) -> None:
    begun: list[int] = []
    expected = 4 * (ahead + 1)
    enough, more = threading.Event(), threading.Event()

    def read(row: int) -> np.ndarray:
        begun.append(row)
        if len(begun) >= expected:
            enough.set()
        if len(begun) > expected:
            more.set()
        return numbered(row)

    batches = decoded_ahead(read, BATCHES, 2, workers)
    next(batches)
    assert enough.wait(10)
    assert not more.wait(0.1)
    batches.close()


def test_threads_end_with_their_iterator() -> None:
    whole = decoded_ahead(numbered, BATCHES, 2, 3)
    next(whole)
    assert len(decoders()) == 3
    for _ in whole:
        pass
    closed, dropped = (decoded_ahead(numbered, BATCHES, 2, 3) for _ in range(2))
    next(closed)
    next(dropped)
    closed.close()
    del dropped  # the fixture waits for the threads of all three


def test_batches_given_up_midway_leave_no_thread(tmp_path: Path) -> None:
    data = Data(load(streamed(write(tmp_path), workers=2)), streamed(tmp_path, workers=2), 0, CPU)

    def first_of_many() -> Tensor:
        for images, _ in data.batches("train", 2, order=None):
            return images
        raise AssertionError("no batch")

    first_of_many()
    gc.collect()
    for thread in decoders():
        thread.join(timeout=10)
    assert not decoders()
    data.batches("train", 2, order=None)  # never begun: no thread either
    assert not decoders()


def test_images_waiting_when_an_iterator_closes_are_never_decoded() -> None:
    release, begun = threading.Event(), []

    def read(row: int) -> np.ndarray:
        begun.append(row)
        if row >= 4:
            release.wait(10)
        return numbered(row)

    batches = decoded_ahead(read, BATCHES, 2, 1)
    next(batches)
    batches.close()
    release.set()
    for thread in decoders():
        thread.join(timeout=10)
    assert max(begun) <= 4


def test_a_file_that_cannot_be_decoded_is_named_when_its_batch_is_due(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path), valid=0))
    data = Data(arrays, streamed(tmp_path, valid=0, weights_share=1), 0, CPU)
    assert isinstance(arrays.train_images, Files)
    broken = Path(arrays.train_images.path(9))
    broken.write_bytes(broken.read_bytes()[:200])
    batches = data.batches("train", 4, order=None)
    next(batches)
    next(batches)
    with pytest.raises(ValueError, match=rf"{broken.name} is not a readable image \(.*mend or remove it"):
        next(batches)
    Path(arrays.train_images.path(0)).unlink()
    with pytest.raises(ValueError, match=r"000\.jpg|No such file"):
        next(data.batches("train", 4, order=None))


# What is shared and recorded.


def test_only_arrays_travel_whatever_the_number_of_files(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    assert isinstance(arrays.train_images, Files)

    def in_band(held: Arrays) -> int:
        buffers: list[pickle.PickleBuffer] = []
        return len(pickle.dumps(held, protocol=5, buffer_callback=buffers.append))

    many = replace(arrays, train_images=replace(arrays.train_images, names=np.repeat(b"a/b.jpg", 100_000)))
    assert in_band(many) < in_band(arrays) + 100
    for array in (arrays.train_images.names, arrays.train_labels, arrays.test_images.names):
        assert not array.flags.writeable


def test_a_relative_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    arrays = load(streamed(Path("here")))
    monkeypatch.chdir("/")
    assert len(epoch(Data(arrays, streamed(Path("here")), 0, CPU))) > 0


def test_the_digest_is_of_names_sizes_and_labels(tmp_path: Path) -> None:
    folder = write(tmp_path)
    first = load(streamed(folder)).sha256
    assert load(streamed(folder)).sha256 == first
    assert load(streamed(folder, valid=0.1)).sha256 == first
    assert load(streamed(folder, limit=12)).sha256 != first
    assert load(streamed(folder, image_size=14)).sha256 != first
    file = folder / "train" / "ant" / "000.jpg"
    os.utime(file, (0, 0))
    assert load(streamed(folder)).sha256 == first
    with file.open("ab") as stream:
        stream.write(b"\0")
    larger = load(streamed(folder)).sha256
    assert larger != first
    file.rename(file.with_name("renamed.jpg"))
    assert load(streamed(folder)).sha256 not in (first, larger)


def test_a_limit_touches_only_the_files_it_keeps(tmp_path: Path) -> None:
    kept = load(streamed(write(tmp_path), limit=8, test_limit=4))
    assert isinstance(kept.train_images, Files)
    assert len(kept.train_images) == 8
    paths = {kept.train_images.path(index) for index in range(8)}
    for file in (tmp_path / "train").rglob("*.jpg"):
        if str(file) not in paths:
            file.write_bytes(b"never read")
    assert load(streamed(tmp_path, limit=8, test_limit=4)).sha256 == kept.sha256


def test_constants_are_those_of_the_training_images_as_evaluated(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    assert isinstance(arrays.train_images, Files)
    pixels = np.stack([arrays.train_images.whole(index) for index in range(24)]) / 255
    assert arrays.mean == pytest.approx(tuple(pixels.mean((0, 2, 3))))
    assert arrays.std == pytest.approx(tuple(pixels.std((0, 2, 3))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": None}, "stream=True needs the size images are brought to; set image_size"),
        ({"stream": False, "workers": 2}, "workers=2 decode streamed images; set stream=True"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(streamed(Path("x"), **options))


def test_only_image_folders_can_be_streamed() -> None:
    with pytest.raises(ValueError, match=r"source='digits' is none; use stream=False"):
        load(DataConfig("digits", stream=True, image_size=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_gpu_is_served_the_same_files_without_waiting(tmp_path: Path) -> None:
    arrays = load(streamed(write(tmp_path)))
    data = Data(arrays, streamed(tmp_path), 0, torch.device("cuda"))
    epoch(data)  # the first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = epoch(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (expected_x, expected_y) in zip(
        found, epoch(Data(arrays, streamed(tmp_path), 0, CPU)), strict=True
    ):
        torch.testing.assert_close(x.cpu(), expected_x, atol=1e-4, rtol=1e-4)
        assert torch.equal(y.cpu(), expected_y)
