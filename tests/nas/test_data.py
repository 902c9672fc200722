"""Splits, augmentation and sources: what a trial may rely on about its images."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import functional as vision

from nas.data import (
    PARTS,
    Arrays,
    Augment,
    Data,
    DataConfig,
    Part,
    draw,
    jittered,
    load,
    resized_crop,
    stratified,
)
from nas.files import boxes
from nas.streams import generator

CPU = torch.device("cpu")
CIFAR10 = Path(__file__).parents[2] / "../shared/data/cifar10"
SIZE = 8


@pytest.fixture(scope="module")
def digits() -> Arrays:
    return load(DataConfig("digits"))


def arrays_of(images: np.ndarray, classes: int = 4, mean: float = 0.5, std: float = 0.25) -> Arrays:
    """Arrays whose labels repeat 0..classes-1, read-only as Ray hands them out."""
    labels = np.arange(len(images)) % classes
    for array in (images, labels):
        array.setflags(write=False)
    names = tuple(f"class {index}" for index in range(classes))
    constants = ((mean,) * images.shape[1], (std,) * images.shape[1])
    return Arrays(images, labels, images[:classes], labels[:classes], names, "made", "digest", *constants)


def coded(count: int, channels: int = 1, size: int = SIZE) -> Arrays:
    """Images all alike in which each pixel's value tells its place: 1, 2, ... by rows; 0 is only padding."""
    place = np.arange(1, size * size + 1, dtype=np.uint8).reshape(1, 1, size, size)
    return arrays_of(np.tile(place, (count, channels, 1, 1)))


def epoch(data: Data, part: Part, batch_size: int = 64, **options: object) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data.batches(part, batch_size, **{"order": None, **options}), strict=True)
    return torch.cat(images), torch.cat(labels)


def raw(normalised: Tensor, arrays: Arrays) -> Tensor:
    """Pixel values 0..255 of normalised images of one mean and deviation."""
    return (normalised * arrays.std[0] + arrays.mean[0]) * 255


# Splits.


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("valid", "weights_share"), [(0.2, 0.5), (0.0, 0.5), (0.1, 0.8), (0.3, 1.0)])
def test_parts_are_disjoint_and_cover_the_training_images(
    digits: Arrays, shuffle: bool, valid: float, weights_share: float
) -> None:
    config = DataConfig(valid=valid, weights_share=weights_share, shuffle=shuffle)
    parts = Data(digits, config, 0, CPU).parts
    together = torch.cat([parts["weights"], parts["arch"], parts["valid"]])
    assert torch.equal(together.sort().values, torch.arange(len(digits.train_labels)))
    assert torch.equal(torch.cat([parts["weights"], parts["arch"]]).sort().values, parts["train"])
    assert len(parts["valid"]) == round(valid * len(together))
    assert len(parts["weights"]) == round(weights_share * len(parts["train"]))


def test_shuffled_parts_keep_each_class_in_its_share(digits: Arrays) -> None:
    data = Data(digits, DataConfig(valid=0.3, weights_share=0.25), 0, CPU)
    counts = np.bincount(digits.train_labels)
    valid = np.bincount(digits.train_labels[data.parts["valid"]])
    weights = np.bincount(digits.train_labels[data.parts["weights"]])
    assert np.all(np.abs(valid - 0.3 * counts) < 1.1)  # a share is off by one image, and the total is rounded
    assert np.all(np.abs(weights - 0.25 * (counts - valid)) < 1.1)


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_stratified_takes_as_many_as_asked_and_each_class_to_within_one(
    labels: list[int], share: float, seed: int
) -> None:
    array = np.array(labels)
    count = round(share * len(array))
    chosen = stratified(array, count, generator(seed))
    assert len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    exact = np.bincount(array) * count / len(array)
    assert np.all(np.abs(np.bincount(array[chosen], minlength=len(exact)) - exact) < 1)


def test_the_seed_decides_the_split_but_never_the_test_part(digits: Arrays) -> None:
    first, again, other = (Data(digits, DataConfig(), seed, CPU) for seed in (0, 0, 1))
    for part in PARTS:
        assert torch.equal(first.parts[part], again.parts[part])
    for part in ("weights", "arch", "train", "valid"):
        assert not torch.equal(first.parts[part], other.parts[part])
    for mine, others in zip(epoch(first, "test"), epoch(other, "test"), strict=True):
        assert torch.equal(mine, others)


def test_unshuffled_parts_are_halves_in_file_order() -> None:
    arrays = coded(100)
    halves = Data(arrays, DataConfig(valid=0, shuffle=False), 3, CPU)
    assert torch.equal(halves.parts["weights"], torch.arange(50))
    assert torch.equal(halves.parts["arch"], torch.arange(50, 100))
    assert halves.size("valid") == 0
    held_out = Data(arrays, DataConfig(valid=0.2, shuffle=False), 3, CPU)
    assert torch.equal(held_out.parts["valid"], torch.arange(80, 100))
    assert torch.equal(held_out.parts["arch"], torch.arange(40, 80))


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_search_sees_its_share_and_retraining_sees_everything(shuffle: bool) -> None:
    config = DataConfig(valid=0.2, search_share=0.25, weights_share=0.8, shuffle=shuffle)
    data = Data(load(config), config, 0, torch.device("cpu"))
    train = data.size("train")
    assert data.size("weights") + data.size("arch") == round(0.25 * train)
    assert data.size("weights") == round(0.8 * round(0.25 * train))
    seen = set(data.parts["weights"].tolist()) | set(data.parts["arch"].tolist())
    assert len(seen) == round(0.25 * train)
    assert seen < set(data.parts["train"].tolist())
    assert not set(data.parts["train"].tolist()) & set(data.parts["valid"].tolist())


def test_a_test_part_cut_from_the_source_is_disjoint_from_training() -> None:
    whole = load(DataConfig("digits", test=0.25))
    train = {image.tobytes() for image in whole.train_images}
    test = [image.tobytes() for image in whole.test_images]
    assert len(whole.train_images) + len(test) == 1797
    assert len(test) == 449
    assert sum(image in train for image in test) == 0  # no digit occurs twice
    assert np.array_equal(whole.test_images, load(DataConfig("digits", test=0.25)).test_images)


# Batches.


def test_unaugmented_batches_are_the_normalised_images_in_stored_order(digits: Arrays) -> None:
    data = Data(digits, DataConfig(), 0, CPU)
    images, labels = epoch(data, "valid", 50)
    expected = digits.train_images[data.parts["valid"]] / 255
    expected = (expected - digits.mean[0]) / digits.std[0]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert np.array_equal(labels.numpy(), digits.train_labels[data.parts["valid"]])


def test_only_the_test_part_holds_the_test_images(digits: Arrays) -> None:
    data = Data(digits, DataConfig(), 0, CPU)
    images, labels = epoch(data, "test")
    np.testing.assert_allclose(raw(images, digits).numpy(), digits.test_images, atol=1e-3)
    assert np.array_equal(labels.numpy(), digits.test_labels)
    test = {image.tobytes() for image in digits.test_images}
    for part in ("weights", "arch", "train", "valid"):
        served = raw(epoch(data, part)[0], digits).round().byte().numpy()
        assert not any(image.tobytes() in test for image in served)


def test_training_images_have_mean_0_and_deviation_1(digits: Arrays) -> None:
    data = Data(digits, DataConfig(valid=0), 0, CPU)
    images, _ = epoch(data, "train")
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_an_ordered_epoch_is_a_permutation_of_images_with_their_labels() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    arrays = arrays_of(np.tile(images, (1, 1, SIZE, SIZE)))
    data = Data(arrays, DataConfig(valid=0, weights_share=1), 0, CPU)
    found, labels = epoch(data, "train", 7, order=generator(0))
    identity = raw(found[:, 0, 0, 0], arrays).round().long()
    assert torch.equal(identity.sort().values, torch.arange(100))
    assert not torch.equal(identity, torch.arange(100))
    assert torch.equal(labels, identity % 4)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(32, [32, 32, 32, 4]), (50, [50, 50]), (100, [100]), (128, [100]), (33, [33, 33, 34]), (99, [100])],
)
def test_a_single_image_left_over_joins_the_batch_before(batch_size: int, sizes: list[int]) -> None:
    data = Data(coded(100), DataConfig(valid=0, weights_share=1), 0, CPU)
    batches = list(data.batches("train", batch_size, order=None))
    assert [len(images) for images, _ in batches] == sizes
    assert [len(labels) for _, labels in batches] == sizes


def test_batches_of_one_stay_batches_of_one() -> None:
    data = Data(coded(8), DataConfig(valid=0, weights_share=1), 0, CPU)
    assert [len(images) for images, _ in data.batches("train", 1, order=None)] == [1] * 8


def test_batches_depend_only_on_their_generators() -> None:
    data = Data(coded(200), DataConfig(valid=0, weights_share=1), 0, CPU)
    augment = Augment(pad=4, flip=True, cutout=4)

    def served(order: int, draws: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        options = {"order": generator(order, "order"), "augment": augment, "draws": generator(draws, "draws")}
        return epoch(data, "train", batch_size, **options)

    images, labels = served(0, 0)
    for same in (served(0, 0), served(0, 0, batch_size=17)):
        assert torch.equal(images, same[0])
        assert torch.equal(labels, same[1])
    # All images are alike, so a difference can only come from the augmentation.
    reordered_images, reordered_labels = served(1, 0)
    assert torch.equal(images, reordered_images)
    assert not torch.equal(labels, reordered_labels)
    redrawn_images, redrawn_labels = served(0, 1)
    assert not torch.equal(images, redrawn_images)
    assert torch.equal(labels, redrawn_labels)


def test_generators_are_drawn_from_at_the_call_not_while_iterating() -> None:
    data = Data(coded(60), DataConfig(valid=0), 0, CPU)
    order = generator(0)
    weights, arch = (epoch(data, part, order=order)[1] for part in ("weights", "arch"))
    order = generator(0)
    late_weights, late_arch = (data.batches(part, 60, order=order) for part in ("weights", "arch"))
    assert torch.equal(next(late_arch)[1], arch)  # iterated first, called last
    assert torch.equal(next(late_weights)[1], weights)


def test_serving_writes_nothing_into_the_shared_arrays() -> None:
    arrays = coded(50, channels=3)
    before = arrays.train_images.copy()
    data = Data(arrays, DataConfig(valid=0), 0, CPU)
    for augment in (None, Augment(), Augment(cutout=8), Augment(resized_crop=True, jitter=(1, 1, 1, 0.5))):
        for images, labels in data.batches("train", 16, order=None, augment=augment, draws=generator(0)):
            images.zero_()
            labels.zero_()
    for images, _ in data.batches("test", 16, order=None):
        images.zero_()
    assert not arrays.train_images.flags.writeable
    assert np.array_equal(arrays.train_images, before)
    assert np.array_equal(arrays.train_labels, np.arange(50) % 4)


def test_images_in_memory_are_shared_not_copied() -> None:
    arrays = coded(10)
    data = Data(arrays, DataConfig(valid=0), 0, CPU)
    assert data._train[0].data_ptr() == arrays.train_images.ctypes.data


# Augmentation.


def test_a_neutral_augment_is_no_augment(digits: Arrays) -> None:
    data = Data(digits, DataConfig(), 0, CPU)
    plain, _ = epoch(data, "train")
    neutral, _ = epoch(data, "train", augment=Augment(), draws=generator(0))
    assert torch.equal(plain, neutral)


def slow_crop(image: np.ndarray, pad: int, top: int, left: int, flip: bool) -> np.ndarray:
    size = image.shape[1]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    cropped = padded[:, top : top + size, left : left + size]
    return cropped[:, :, ::-1] if flip else cropped


def slow_cutout(image: np.ndarray, length: int, y: int, x: int) -> np.ndarray:
    """Cutout with the arithmetic of the authors' code."""
    _, height, width = image.shape
    mask = np.ones((height, width), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, height), np.clip(y + length // 2, 0, height)
    x1, x2 = np.clip(x - length // 2, 0, width), np.clip(x + length // 2, 0, width)
    mask[y1:y2, x1:x2] = 0
    return image * mask


@pytest.mark.parametrize("cutout", [0, 1, 2, 4, 5, 8])
def test_a_batch_equals_each_image_augmented_by_itself(digits: Arrays, cutout: int) -> None:
    data = Data(digits, DataConfig(), 0, CPU)
    augment = Augment(pad=3, flip=True, cutout=cutout)
    images, _ = epoch(data, "valid", 100, augment=augment, draws=generator(5))
    drawn = draw(augment, data.size("valid"), SIZE, generator(5))
    for row, index in enumerate(data.parts["valid"].tolist()):
        top, left = drawn["offset"][row].tolist()
        expected = slow_crop(digits.train_images[index], 3, top, left, bool(drawn["flip"][row]))
        expected = (expected / 255 - digits.mean[0]) / digits.std[0]
        expected = slow_cutout(expected, cutout, *drawn["centre"][row].tolist())
        np.testing.assert_allclose(images[row].numpy(), expected, atol=1e-6)


def test_offsets_are_uniform_flips_fair_and_independent_as_seen_in_the_images() -> None:
    arrays, pad = coded(20_000), 2
    data = Data(arrays, DataConfig(valid=0, weights_share=1), 0, CPU)
    augment = Augment(pad=pad, flip=True)
    images, _ = epoch(data, "train", 1000, augment=augment, draws=generator(1))
    place = raw(images[:, 0], arrays).round().long()
    middle, right = place[:, SIZE // 2, SIZE // 2], place[:, SIZE // 2, SIZE // 2 + 1]
    flipped = right < middle
    # Place of the pixel now in the middle, counted from 0; it is never padding as pad < SIZE / 2.
    row, column = (middle - 1) // SIZE, (middle - 1) % SIZE
    top = row - SIZE // 2 + pad
    left = column - torch.where(flipped, SIZE // 2 - 1, SIZE // 2) + pad
    cells = (top * (2 * pad + 1) + left) * 2 + flipped
    counts = torch.bincount(cells)
    assert len(counts) == 2 * (2 * pad + 1) ** 2
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_cutout_centres_are_uniform_over_all_pixels() -> None:
    arrays = coded(20_000)
    data = Data(arrays, DataConfig(valid=0, weights_share=1), 0, CPU)
    images, _ = epoch(data, "train", 1000, augment=Augment(cutout=2), draws=generator(2))
    cut = images[:, 0] == 0
    # A square of side 2 reaches one pixel up and left of its centre, which is the last of its pixels.
    last = cut.flatten(1).int().cumsum(1).argmax(1)
    assert stats.chisquare(torch.bincount(last, minlength=SIZE**2).numpy()).pvalue > 1e-4
    assert set(cut.sum((1, 2)).tolist()) == {1, 2, 4}  # corner, edge, inside


def test_padding_is_black_before_and_cutout_zero_after_normalisation() -> None:
    arrays = replace(coded(400), mean=(0.4,), std=(0.2,))
    data = Data(arrays, DataConfig(valid=0, weights_share=1), 0, CPU)
    padded, _ = epoch(data, "train", augment=Augment(pad=SIZE), draws=generator(0))
    assert padded.min().item() == pytest.approx((0 - 0.4) / 0.2, abs=1e-6)
    assert torch.count_nonzero(padded == 0) == 0
    cut, _ = epoch(data, "train", augment=Augment(cutout=SIZE), draws=generator(0))
    assert torch.all((cut == 0).any(dim=3).any(dim=2))


def test_switching_one_augmentation_leaves_the_draws_of_the_others() -> None:
    full = draw(Augment(pad=4, flip=True, cutout=4), 500, SIZE, generator(0))
    for part, augment in (
        ("offset", Augment(pad=4)),
        ("flip", Augment(flip=True)),
        ("centre", Augment(cutout=4, resized_crop=True)),
    ):
        assert torch.equal(draw(augment, 500, SIZE, generator(0))[part], full[part])


def test_resized_crop_boxes_follow_torchvision() -> None:
    size, count = 64, 4000
    uniform = draw(Augment(resized_crop=True), count, size, generator(0))["crop"]
    found = torch.from_numpy(boxes(uniform.numpy(), size, size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(3, size, size)
        params = torchvision.transforms.RandomResizedCrop.get_params
        theirs = torch.tensor([params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(count)])
    for column in range(4):
        assert stats.ks_2samp(found[:, column], theirs[:, column]).pvalue > 1e-4
    assert stats.ks_2samp(found[:, 2] / found[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-4
    area = found[:, 2] * found[:, 3] / size**2
    assert 0.07 < area.min() < 0.085  # 0.08, its sides rounded
    assert area.max() > 0.98
    assert torch.all(found[:, :2] >= 0)
    assert torch.all(found[:, :2] + found[:, 2:] <= size)


def test_resized_crop_samples_its_box_bilinearly() -> None:
    size = 16
    steps = torch.arange(float(size))
    image = (10 * steps[:, None] + steps[None, :]).expand(4, 2, size, size)
    boxes = torch.tensor([[0, 0, 16, 16], [3, 5, 8, 4], [3, 5, 8, 4], [0, 9, 15, 7]])
    flips = torch.tensor([False, False, True, False])
    found = resized_crop(image, boxes.float(), flips)
    for (top, left, height, width), flip, cropped in zip(boxes.tolist(), flips, found, strict=True):
        # On a plane interpolation is exact, so each pixel holds its own coordinates.
        y = (top + (steps + 0.5) * height / size - 0.5).clamp(0, size - 1)
        x = (left + (steps + 0.5) * width / size - 0.5).clamp(0, size - 1)
        expected = 10 * y[:, None] + (x.flip(0) if flip else x)[None, :]
        torch.testing.assert_close(cropped, expected.expand(2, size, size), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "factors",
    [(1, 1, 1, 0), (0.6, 1, 1, 0), (1, 1.4, 1, 0), (1, 1, 0, 0), (1, 1, 1, 0.2), (1.3, 0.7, 1.4, -0.45)],
)
def test_jitter_equals_torchvision_step_by_step(factors: tuple[float, float, float, float]) -> None:
    images = torch.rand(5, 3, 6, 6, generator=generator(0))
    images[0] = 0.5  # no hue
    images[1] = images[1].round()
    expected = vision.adjust_brightness(images, factors[0])
    expected = torch.stack([vision.adjust_contrast(image, factors[1]) for image in expected])
    expected = vision.adjust_hue(vision.adjust_saturation(expected, factors[2]), factors[3])
    torch.testing.assert_close(
        jittered(images, torch.tensor(factors, dtype=torch.float32).expand(5, 4)), expected
    )


def test_jitter_factors_are_uniform_within_their_strengths() -> None:
    strengths = (0.4, 0.3, 0.2, 0.1)
    factors = draw(Augment(jitter=strengths), 4000, SIZE, generator(0))["jitter"]
    for column, (centre, strength) in enumerate(zip((1, 1, 1, 0), strengths, strict=True)):
        uniform = stats.uniform(centre - strength, 2 * strength)
        assert stats.kstest(factors[:, column].numpy(), uniform.cdf).pvalue > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_gpu_serves_the_same_batches_without_waiting() -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 3, SIZE, SIZE), dtype=np.uint8)
    arrays = arrays_of(images)
    config = DataConfig(valid=0)
    for augment in (Augment(4, True, 4), Augment(flip=True, resized_crop=True, jitter=(0.4, 0.4, 0.4, 0.2))):

        def options(augment: Augment = augment) -> dict[str, object]:
            return {"order": generator(0), "augment": augment, "draws": generator(1)}

        on_gpu = Data(arrays, config, 0, torch.device("cuda"))
        epoch(on_gpu, "train", **options())  # the first use of a kernel may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = epoch(on_gpu, "train", **options())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = epoch(Data(arrays, config, 0, CPU), "train", **options())
        torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[1].cpu(), expected[1])


# Sources.


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (SIZE, SIZE, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int],
    metadata: dict[str, str] | None = None,
    **options: object,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path, **options)
    return path


def write_folder(path: Path, images: np.ndarray, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    for index, image in enumerate(images):
        file = path / classes[index % len(classes)] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    return path


def test_digits_fill_the_range_of_a_byte(digits: Arrays) -> None:
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.train_images.dtype == np.uint8
    values = np.unique(digits.train_images)
    assert values.tolist() == [round(value * 255 / 16) for value in range(17)]
    assert digits.classes == tuple("0123456789")


def test_arrays_are_read_only_and_named_by_their_content(digits: Arrays) -> None:
    for array in (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels):
        assert not array.flags.writeable
    assert load(DataConfig("digits", valid=0.1)).sha256 == digits.sha256
    assert load(DataConfig("digits", limit=500)).sha256 != digits.sha256
    assert load(DataConfig("digits", test_limit=99)).sha256 != digits.sha256


def test_limits_take_a_stratified_subset_in_stored_order(digits: Arrays) -> None:
    small = load(DataConfig("digits", limit=100, test_limit=50))
    assert np.bincount(small.train_labels).tolist() == pytest.approx([10] * 10, abs=1)
    assert len(small.test_labels) == 50
    rows = [image.tobytes() for image in digits.train_images]
    positions = [rows.index(image.tobytes()) for image in small.train_images]
    assert positions == sorted(positions)
    beyond = load(DataConfig("digits", limit=10**6))
    assert np.array_equal(beyond.train_images, digits.train_images)


def test_images_in_memory_are_resized_on_request() -> None:
    arrays = load(DataConfig("digits", image_size=16, limit=50))
    assert arrays.train_images.shape == (50, 1, 16, 16)
    assert Data(arrays, DataConfig(), 0, CPU).image_size == 16


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_keeps_row_order_and_class_names(tmp_path: Path, as_struct: bool) -> None:
    images = pictures(30)
    labels = [index * 7 % 3 for index in range(30)]
    columns: list[object] = [encoded(image) for image in images]
    if as_struct:
        columns = [{"bytes": data, "path": "x.png"} for data in columns]
    names = {"class_names": "ant,bee,cat"}
    if as_struct:
        features = {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
        names = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"label": labels, "image": columns, "more": labels}).replace_schema_metadata(names)
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 6), tmp_path / "test.parquet")
    arrays = load(DataConfig(str(tmp_path)))
    assert np.array_equal(arrays.train_images, images.transpose(0, 3, 1, 2))
    assert arrays.train_labels.tolist() == labels
    assert np.array_equal(arrays.test_images, arrays.train_images[:6])
    assert arrays.classes == ("ant", "bee", "cat")
    assert arrays.name == tmp_path.name


def test_a_parquet_file_alone_gives_a_fixed_test_part(tmp_path: Path) -> None:
    images = pictures(40, shape=(SIZE, SIZE))
    path = write_parquet(
        tmp_path / "all.parquet", [encoded(i) for i in images], [0, 1] * 20, row_group_size=9
    )
    arrays = load(DataConfig(str(path), test=0.25))
    assert arrays.train_images.shape == (30, 1, SIZE, SIZE)
    assert np.bincount(arrays.test_labels).tolist() == [5, 5]
    assert arrays.classes == ("0", "1")
    found = {image.tobytes() for image in np.concatenate([arrays.train_images, arrays.test_images])}
    assert found == {image.tobytes() for image in images}
    for image, label in zip(arrays.train_images, arrays.train_labels, strict=True):
        assert label == next(i for i, it in enumerate(images) if np.array_equal(it, image[0])) % 2


def test_a_limit_decodes_only_the_rows_it_keeps(tmp_path: Path) -> None:
    good = encoded(pictures(1)[0])
    labels = [0, 1] * 20
    path = write_parquet(tmp_path / "train.parquet", [good] * 40, labels)
    write_parquet(tmp_path / "test.parquet", [good] * 4, [0, 1, 0, 1])
    kept = stratified(np.array(labels), 10, generator(0, "data", "limit"))
    images: list[bytes | None] = [good if row in kept else b"never read" for row in range(40)]
    write_parquet(path, images, labels)
    assert len(load(DataConfig(str(tmp_path), limit=10)).train_images) == 10


def test_rows_sorted_by_class_are_mixed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "all.parquet", [encoded(i) for i in pictures(80)], [1] * 40 + [0] * 40)
    arrays = load(DataConfig(str(path)))
    half = Data(arrays, DataConfig(valid=0, shuffle=False), 0, CPU).parts["weights"]
    assert 4 < arrays.train_labels[half].sum() < 28
    assert np.array_equal(arrays.train_labels, load(DataConfig(str(path))).train_labels)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folders_hold_a_subfolder_a_class(tmp_path: Path, test_name: str) -> None:
    images = pictures(24)
    write_folder(tmp_path / "train", images[:16])
    write_folder(tmp_path / test_name, images[16:])
    for name in ("notes.txt", "._000.png"):
        (tmp_path / "train" / "ant" / name).write_text("not an image")
    arrays = load(DataConfig(str(tmp_path)))
    assert arrays.classes == ("ant", "bee")
    for found, labels, given_images in (
        (arrays.train_images, arrays.train_labels, images[:16]),
        (arrays.test_images, arrays.test_labels, images[16:]),
    ):
        table = {image.transpose(2, 0, 1).tobytes(): i % 2 for i, image in enumerate(given_images)}
        assert [table[image.tobytes()] for image in found] == labels.tolist()
        assert len(found) == len(given_images)


def test_a_folder_without_parts_is_split(tmp_path: Path) -> None:
    arrays = load(DataConfig(str(write_folder(tmp_path, pictures(20), ("ant", "train"))), test=0.3))
    assert arrays.classes == ("ant", "train")
    assert np.bincount(arrays.test_labels).tolist() == [3, 3]
    assert np.bincount(arrays.train_labels).tolist() == [7, 7]


def test_images_of_any_shape_are_scaled_and_cropped_to_image_size(tmp_path: Path) -> None:
    for index, (height, width) in enumerate([(12, 20), (20, 12), (8, 8), (40, 40)] * 3):
        image = np.full((height, width, 3), 255, np.uint8)
        side = min(height, width)
        middle = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
        middle[:, : side // 2] = 0  # the middle square is half black
        file = tmp_path / str(index % 2) / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(image))
    arrays = load(DataConfig(str(tmp_path), image_size=8))
    assert arrays.train_images.shape[1:] == (3, 8, 8)
    assert np.all(arrays.train_images[:, :, 1:7, 1:3] == 0)
    assert np.all(arrays.train_images[:, :, 1:7, 5:7] == 255)


def test_one_colour_image_makes_all_of_them_colour(tmp_path: Path) -> None:
    grey, colour = pictures(8, shape=(SIZE, SIZE)), pictures(4)
    train = [encoded(image) for image in grey]
    write_parquet(tmp_path / "train.parquet", train, [0, 1] * 4)
    write_parquet(tmp_path / "test.parquet", [encoded(image) for image in colour], [0, 1] * 2)
    arrays = load(DataConfig(str(tmp_path)))
    assert np.array_equal(arrays.train_images, np.repeat(grey[:, None], 3, axis=1))
    assert np.array_equal(arrays.test_images, colour.transpose(0, 3, 1, 2))


def test_constants_are_those_of_the_training_images_and_never_divide_by_zero(tmp_path: Path) -> None:
    images = pictures(20)
    images[..., 2] = 51
    path = write_parquet(tmp_path / "train.parquet", [encoded(image) for image in images], [0, 1] * 10)
    write_parquet(tmp_path / "test.parquet", [encoded(image) for image in pictures(2, seed=1)], [0, 1])
    arrays = load(DataConfig(str(path.parent)))
    assert arrays.mean == pytest.approx(tuple((images / 255).mean((0, 1, 2))))
    assert arrays.mean[2] == pytest.approx(0.2)
    assert arrays.std == pytest.approx((*(images / 255).std((0, 1, 2))[:2], 1))


def write_fashion_mnist(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Files in the format that torchvision downloads."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x00000803, *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x00000801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_fashion_mnist_is_read_from_root(tmp_path: Path) -> None:
    images, labels = pictures(20, shape=(28, 28)), np.arange(20, dtype=np.uint8) * 3 % 10
    write_fashion_mnist(tmp_path, images, labels)
    arrays = load(DataConfig("fashion_mnist", root=str(tmp_path), download=False))
    assert np.array_equal(arrays.train_images[:, 0], images)
    assert arrays.train_labels.tolist() == labels.tolist()
    assert arrays.classes[0] == "T-shirt/top"
    assert arrays.mean == pytest.approx((images.mean() / 255,))


@pytest.mark.parametrize(
    ("source", "folder", "parts", "key", "mean"),
    [
        ("cifar10", "cifar-10-batches-py", ["data_batch_1", "test_batch"], "labels", 0.49139968),
        ("cifar100", "cifar-100-python", ["train", "test"], "fine_labels", 0.5071),
    ],
)
def test_cifar_is_read_from_root_with_published_constants(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    folder: str,
    parts: list[str],
    key: str,
    mean: float,
) -> None:
    dataset = getattr(torchvision.datasets, source.upper())
    classes = int(source.removeprefix("cifar"))
    pixels, labels = pictures(2 * classes, shape=(3 * 32 * 32,)), [*range(classes)] * 2
    (tmp_path / folder).mkdir()
    for part in parts:
        (tmp_path / folder / part).write_bytes(pickle.dumps({"data": pixels, key: labels}))
    names = [f"class {index}" for index in range(classes)]
    meta = tmp_path / folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    monkeypatch.setattr(dataset, "train_list", [[parts[0], None]])
    monkeypatch.setattr(dataset, "test_list", [[parts[1], None]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    arrays = load(DataConfig(source, root=str(tmp_path), download=False))
    assert np.array_equal(arrays.train_images, pixels.reshape(-1, 3, 32, 32))
    assert arrays.test_labels.tolist() == labels
    assert arrays.classes == tuple(names)
    assert arrays.mean[0] == mean


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs CIFAR-10 as Parquet in ../shared/data/cifar10")
def test_the_real_cifar10_parquet_loads() -> None:
    arrays = load(DataConfig(str(CIFAR10), limit=500, test_limit=200))
    assert arrays.train_images.shape == (500, 3, 32, 32)
    assert arrays.test_images.shape == (200, 3, 32, 32)
    assert arrays.classes[:2] == ("airplane", "automobile")
    assert np.bincount(arrays.train_labels).tolist() == [50] * 10
    assert np.bincount(arrays.test_labels).tolist() == [20] * 10
    # The pixels of the whole training set have this mean (0.4914, 0.4822, 0.4465), so 500 images are near it.
    assert arrays.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.03)
    data = Data(arrays, DataConfig(), 0, CPU)
    assert (data.classes, data.channels, data.image_size) == (10, 3, 32)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 1.0}, r"valid=1.0 must be in \[0, 1\)"),
        ({"valid": -0.1}, "valid=-0.1"),
        ({"valid": float("nan")}, "valid=nan"),
        ({"test": 0.0}, "test=0.0 must be in"),
        ({"weights_share": 0.0}, "weights_share=0.0 must be in"),
        ({"weights_share": 1.5}, "weights_share=1.5 must be in"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"test_limit": -1}, "test_limit=-1 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
    ],
)
def test_config_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": -1}, "pad=-1 must not be negative"),
        ({"cutout": -2}, "cutout=-2 must not be negative"),
        ({"pad": 4, "resized_crop": True}, "two crops"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue in"),
        ({"jitter": (1.4, 0.4, 0.4, 0.1)}, "first three"),
    ],
)
def test_augment_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)


@pytest.mark.parametrize(
    ("part", "batch_size", "options", "message"),
    [
        ("train", 8, {"augment": Augment(flip=True)}, "augment needs draws"),
        (
            "train",
            8,
            {"augment": Augment(cutout=16), "draws": generator(0)},
            "cutout=16 exceeds the image size 8",
        ),
        ("train", 8, {"augment": Augment(pad=9), "draws": generator(0)}, "pad=9 exceeds"),
        ("train", 8, {"augment": Augment(jitter=(0, 0, 0, 0)), "draws": generator(0)}, "3 colour channels"),
        ("train", 0, {}, "batch_size=0"),
        ("valid", 8, {}, "part='valid' is empty"),
        ("dev", 8, {}, "part='dev' is unknown; use one of weights, arch, train, valid, test"),
    ],
)
def test_batches_that_cannot_be_served(
    part: Part, batch_size: int, options: dict[str, object], message: str
) -> None:
    data = Data(coded(20), DataConfig(valid=0), 0, CPU)
    with pytest.raises(ValueError, match=message):
        data.batches(part, batch_size, order=None, **options)  # at the call, not at the first batch


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("options", [{"valid": 0.01}, {"valid": 0.95}, {"weights_share": 0.01}])
def test_no_part_may_come_out_empty(options: dict[str, float], shuffle: bool) -> None:
    with pytest.raises(ValueError, match="none may be empty"):
        Data(coded(10), DataConfig(**{"valid": 0, "shuffle": shuffle, **options}), 0, CPU)


def test_unknown_sources_list_the_known_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"source='cifar11'.*digits, cifar10, cifar100, fashion_mnist"
    ):
        load(DataConfig("cifar11"))


def test_a_limit_below_the_classes_names_one_that_is_lost() -> None:
    with pytest.raises(ValueError, match=r"no training image of class .* limit=5"):
        load(DataConfig("digits", limit=5))


def test_a_test_part_that_would_be_empty(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(4))
    with pytest.raises(ValueError, match=r"test=0\.1 of 4 images"):
        load(DataConfig(str(tmp_path), test=0.1))


def test_a_data_set_that_may_not_be_fetched_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"download=False.*from torchvision\.datasets import CIFAR10"):
        load(DataConfig("cifar10", root=str(tmp_path), download=False))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("Error downloading")])
def test_a_data_set_that_cannot_be_fetched_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(self: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    with pytest.raises(FileNotFoundError, match=f"failed .*{error.args[0]}.*FashionMNIST.*copy that folder"):
        load(DataConfig("fashion_mnist", root=str(tmp_path)))


PNG = encoded(pictures(1)[0])


def table(**columns: object) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (table(img=[PNG], label=[0]), "no column image, only img, label"),
        (table(x=[1]), "no column image or label, only x"),
        (table(image=[PNG], label=["ant"]), "labels of type string"),
        (table(image=[PNG], label=[0.5]), "labels of type double"),
        (table(image=[PNG, PNG], label=[0, None]), "labels of type int64 with 1 nulls"),
        (table(image=["x.png"], label=[0]), "images of type string"),
        (table(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), "holds no rows"),
        (table(image=[PNG] * 4, label=[0, 2, 0, 2]), "labels 0..2 in 2 classes"),
        (table(image=[PNG] * 4, label=[-1, 0, -1, 0]), "labels -1..0 in 2 classes"),
        (
            table(image=[PNG, PNG, PNG[:50], PNG], label=[0, 1] * 2),
            "all.parquet row 2 is not a readable image",
        ),
        (table(image=[PNG, None, PNG, PNG], label=[0, 1] * 2), "all.parquet row 1 is not .*null"),
        (lambda path: path.write_bytes(b"PAR1 and no more"), "all.parquet cannot be read as Parquet"),
    ],
)
def test_parquet_that_cannot_be_used(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "all.parquet")
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(tmp_path / "all.parquet"), test=0.5))


def test_labels_beyond_the_named_classes(tmp_path: Path) -> None:
    names = {"class_names": "ant,bee"}
    path = write_parquet(tmp_path / "all.parquet", [PNG] * 6, [0, 1, 0, 2, 1, 0], names)
    with pytest.raises(ValueError, match=r"row 3 holds label=2, outside 0\.\.1"):
        load(DataConfig(str(path)))


def test_a_named_class_without_images(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "all.parquet", [PNG] * 6, [0, 1] * 3, {"class_names": "ant,bee,cat"})
    with pytest.raises(ValueError, match="no training image of class 'cat'"):
        load(DataConfig(str(path)))


def test_test_parts_of_other_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [PNG] * 4, [0, 1] * 2, {"class_names": "ant,bee"})
    write_parquet(tmp_path / "test.parquet", [PNG] * 4, [0, 1] * 2, {"class_names": "bee,ant"})
    with pytest.raises(ValueError, match="they must be the same"):
        load(DataConfig(str(tmp_path)))
    write_parquet(tmp_path / "test.parquet", [PNG] * 4, [0, 1, 0, 2])
    with pytest.raises(ValueError, match=r"test.parquet row 3 holds label=2"):
        load(DataConfig(str(tmp_path)))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    config = DataConfig(str(tmp_path))
    with pytest.raises(ValueError, match=r"neither train\.parquet nor subfolders of classes"):
        load(config)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image; files must end in"):
        load(config)
    write_folder(tmp_path / "train", pictures(8))
    write_folder(tmp_path / "test", pictures(3), ("ant", "bee", "cat"))
    with pytest.raises(ValueError, match="the class 'cat' that the training part lacks"):
        load(config)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(8))
    (tmp_path / "bee" / "broken.png").write_bytes(PNG[:40])
    with pytest.raises(ValueError, match=r"bee/broken\.png is not a readable image"):
        load(DataConfig(str(tmp_path)))
    deep = Image.fromarray(np.zeros((SIZE, SIZE), np.uint16))
    deep.save(tmp_path / "bee" / "broken.png")
    with pytest.raises(ValueError, match=r"bee/broken\.png .*not 8 bits a channel"):
        load(DataConfig(str(tmp_path)))


def test_images_of_several_sizes_name_a_file_and_the_way_out(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(8))
    (tmp_path / "bee" / "large.png").write_bytes(encoded(pictures(1, shape=(12, 10))[0]))
    with pytest.raises(ValueError, match=r"large\.png is 12x10, the first 8x8.*set image_size"):
        load(DataConfig(str(tmp_path), test=0.3))


def test_images_that_cannot_fit_in_memory_name_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, pictures(20))
    size = 3 * SIZE * SIZE
    for room, fits in ((16 * size, True), (16 * size - 1, False)):  # 16 of 20 images are trained on
        pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": room}
        with monkeypatch.context() as patch:
            patch.setattr("nas.sources.os.sysconf", pages.__getitem__)
            if fits:
                load(DataConfig(str(tmp_path)))
            else:
                with pytest.raises(ValueError, match=r"16 images of 8x8 take .* GB.*set stream=True"):
                    load(DataConfig(str(tmp_path)))


def test_images_must_be_square_and_alike_in_both_parts(tmp_path: Path) -> None:
    wide = [encoded(image) for image in pictures(6, shape=(8, 12))]
    path = write_parquet(tmp_path / "train.parquet", wide, [0, 1] * 3)
    with pytest.raises(ValueError, match=r"8x12.*set image_size"):
        load(DataConfig(str(path), test=0.5))
    write_parquet(path, [PNG] * 4, [0, 1] * 2)
    write_parquet(tmp_path / "test.parquet", wide, [0, 1] * 3)
    with pytest.raises(ValueError, match="training images of 8x8 and test images of 8x12"):
        load(DataConfig(str(tmp_path)))
    assert load(DataConfig(str(tmp_path), image_size=8)).test_images.shape == (6, 3, 8, 8)
