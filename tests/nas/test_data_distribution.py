"""Whether our augmented images are distributed as those of the published torchvision recipes.

Images whose pixels tell their own place go through both pipelines, and what was done to each is read off the
output: offset, mirroring and cutout. Every output must be exactly what these say, border and clipping too. So
the outputs are distributed alike if the parameters are, which chi-square tests decide. Seeds are fixed. A
family of tests accepts where every p-value exceeds 0.001 divided by their number, and must refuse each of the
mutants: pipelines wrong in one way that a reader of the code could overlook.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as vision

import nas.data
import nas.files
from nas.data import Arrays, Augment, Data, DataConfig
from nas.files import Files
from nas.streams import generator

FAMILY = 1e-3
MEAN, STD = (0.4912, 0.4823, 0.4467), (0.2471, 0.2435, 0.2617)
PValues = dict[str, float]


def served(images: np.ndarray | Files, augment: Augment, size: int) -> Iterator[Tensor]:
    """Our images of one epoch, by batches."""
    count = len(images)
    labels = np.arange(count) % 2
    config = DataConfig(valid=0, weights_share=1, shuffle=False)
    if isinstance(images, Files):
        config = DataConfig(valid=0, weights_share=1, shuffle=False, stream=True, image_size=size, workers=2)
    arrays = Arrays(images, labels, images, labels, ("ant", "bee"), "made", "digest", MEAN, STD)
    data = Data(arrays, config, 0, torch.device("cpu"))
    for batch, _ in data.batches("train", 500, order=None, augment=augment, draws=generator(0, "draws")):
        yield batch


def accepted(p_values: PValues) -> bool:
    return min(p_values.values()) > FAMILY / len(p_values)


def same_law(ours: np.ndarray, theirs: np.ndarray, cells: int) -> float:
    """The p-value that two samples of numbers 0..cells-1 come from one distribution."""
    table = np.array([np.bincount(sample, minlength=cells) for sample in (ours, theirs)])
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


def uniform_law(ours: np.ndarray, cells: int) -> float:
    return float(stats.chisquare(np.bincount(ours, minlength=cells)).pvalue)


def independent(ours: np.ndarray, others: np.ndarray) -> float:
    return float(stats.chi2_contingency(stats.contingency.crosstab(ours, others).count).pvalue)


# The CIFAR recipe: crop out of a black border, mirror, normalise, cutout.

SIZE, PAD, CUTOUT, COUNT = 32, 4, 16, 8100  # 50 images for each offset and mirroring
OFFSETS = 2 * PAD + 1


def coded() -> np.ndarray:
    """An image (3, S, S) whose channels are 10 + row, 10 + column and 200; 0 is only padding."""
    place = np.arange(10, 10 + SIZE, dtype=np.uint8)
    rows, columns = np.meshgrid(place, place, indexing="ij")
    return np.stack([rows, columns, np.full_like(rows, 200)])


class Cutout:
    """The published transform, with a generator of its own."""

    def __init__(self, length: int) -> None:
        self.length, self.draws = length, np.random.default_rng(0)

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        mask = np.ones((height, width), np.float32)
        y, x = self.draws.integers(height), self.draws.integers(width)
        y1, y2 = np.clip([y - self.length // 2, y + self.length // 2], 0, height)
        x1, x2 = np.clip([x - self.length // 2, x + self.length // 2], 0, width)
        mask[y1:y2, x1:x2] = 0.0
        return image * torch.from_numpy(mask)


def plain_cifar() -> Iterator[Tensor]:
    recipe = transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=PAD),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            Cutout(CUTOUT),
        ]
    )
    image = Image.fromarray(coded().transpose(1, 2, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(0, COUNT, 500):
            yield torch.stack([recipe(image) for _ in range(min(500, COUNT))])


def our_cifar() -> Iterator[Tensor]:
    images = np.broadcast_to(coded(), (COUNT, 3, SIZE, SIZE)).copy()
    return served(images, Augment(pad=PAD, flip=True, cutout=CUTOUT), SIZE)


@dataclass(frozen=True)
class Changes:
    """What was done to each image, as read off the output."""

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    y: np.ndarray
    x: np.ndarray
    """Row and column of the centre of the cutout."""


def changes(batches: Iterator[Tensor]) -> Changes:
    read = [_changes(batch.numpy()) for batch in batches]
    return Changes(*(np.concatenate(columns) for columns in zip(*read, strict=True)))


def _changes(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Parameters of images (B, 3, S, S), each of which must be what they say to the last pixel."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    raw = np.rint((images * std + mean) * 255).astype(int)
    cut = (images == 0).all(axis=1)
    y, x = (_centre(cut.any(axis=axis)) for axis in (2, 1))
    shown = ~cut & (raw[:, 2] == 200)  # neither cut nor border
    place = np.arange(SIZE)
    top = _common(raw[:, 0] - 10 - place[:, None] + PAD, shown)
    straight = _common(raw[:, 1] - 10 - place + PAD, shown)
    mirrored = _common(raw[:, 1] - 10 - place[::-1] + PAD, shown)
    flip = straight < 0
    assert np.all(flip ^ (mirrored < 0)), "columns run neither up nor down by one"
    left = np.where(flip, mirrored, straight)
    assert top.min() >= 0
    # What these parameters say: the black border, the crop, the mirror, then the clipped square of zeros.
    bordered = np.pad(coded(), ((0, 0), (PAD, PAD), (PAD, PAD))) / np.float32(255)
    bordered = ((bordered - mean) / std).astype(np.float32)
    rows = top[:, None] + place
    columns = left[:, None] + np.where(flip[:, None], place[::-1], place)
    expected = bordered[:, rows[:, :, None], columns[:, None, :]].transpose(1, 0, 2, 3)
    half = CUTOUT // 2
    inside_y, inside_x = ((place >= c[:, None] - half) & (place < c[:, None] + half) for c in (y, x))
    expected = expected * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])
    np.testing.assert_allclose(images, expected, atol=1e-5)
    return top, left, flip.astype(int), y, x


def _centre(hidden: np.ndarray) -> np.ndarray:
    """Centres of the squares that hide rows (or columns) `hidden` (B, S); each clipped form has its own."""
    first, last = hidden.argmax(axis=1), SIZE - 1 - hidden[:, ::-1].argmax(axis=1)
    return np.where(last < SIZE - 1, last + 1 - CUTOUT // 2, first + CUTOUT // 2)


def _common(values: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The value (B,) that all shown pixels share; -1 where they differ."""
    low = np.where(shown, values, 10**6).min(axis=(1, 2))
    high = np.where(shown, values, -(10**6)).max(axis=(1, 2))
    return np.where(low == high, low, -1)


def cifar_p_values(ours: Changes, theirs: Changes) -> PValues:
    def cells(found: Changes) -> np.ndarray:
        return (found.top * OFFSETS + found.left) * 2 + found.flip

    def coarse(found: Changes) -> np.ndarray:
        return found.y // 4 * 8 + found.x // 4

    return {
        "81 offsets, twice for the mirrored: as theirs": same_law(cells(ours), cells(theirs), 2 * OFFSETS**2),
        "81 offsets, twice for the mirrored: uniform": uniform_law(cells(ours), 2 * OFFSETS**2),
        "mirrored as often": same_law(ours.flip, theirs.flip, 2),
        "cutout rows: as theirs": same_law(ours.y, theirs.y, SIZE),
        "cutout columns: as theirs": same_law(ours.x, theirs.x, SIZE),
        "cutout rows: uniform": uniform_law(ours.y, SIZE),
        "cutout columns: uniform": uniform_law(ours.x, SIZE),
        "cutout squares, in 64 fields: as theirs": same_law(coarse(ours), coarse(theirs), 64),
        "cutout and mirroring independent": independent(coarse(ours), ours.flip),
        "cutout and offset independent, rows": independent(ours.y // 4, ours.top),
        "cutout and offset independent, columns": independent(ours.x // 4, ours.left),
    }


@pytest.fixture(scope="module")
def theirs() -> Changes:
    found = changes(plain_cifar())
    return Changes(*(getattr(found, name)[:COUNT] for name in ("top", "left", "flip", "y", "x")))


def test_the_cifar_recipe_is_distributed_as_torchvision_and_cutout_make_it(theirs: Changes) -> None:
    ours = changes(our_cifar())
    assert len(ours.top) == len(theirs.top) == COUNT
    p_values = cifar_p_values(ours, theirs)
    assert accepted(p_values), p_values
    # Both reach every offset and every clipped square, and nothing else.
    for found in (ours, theirs):
        assert set(found.top) == set(found.left) == set(range(OFFSETS))
        assert set(found.y) == set(found.x) == set(range(SIZE))


def test_the_reading_knows_what_torchvision_drew() -> None:
    image = torch.from_numpy(coded())[None]
    recipe = transforms.Normalize(MEAN, STD)
    for top, left, flip, y, x in ((0, 8, 0, 0, 31), (8, 0, 1, 31, 0), (4, 4, 1, 8, 24), (3, 5, 0, 16, 7)):
        padded = torch.nn.functional.pad(image, (PAD,) * 4)[:, :, top : top + SIZE, left : left + SIZE]
        shown = recipe((padded.flip(3) if flip else padded) / 255)
        shown[:, :, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        assert [int(value[0]) for value in _changes(shown.numpy())] == [top, left, flip, y, x]


Drawn = dict[str, Tensor]


def narrow_offsets(drawn: Drawn) -> None:
    drawn["offset"] = drawn["offset"] * (OFFSETS - 1) // OFFSETS  # 0..7 instead of 0..8


def one_offset_for_both_axes(drawn: Drawn) -> None:
    drawn["offset"] = drawn["offset"][:, :1].expand(-1, 2)


def flips_of_45_percent(drawn: Drawn) -> None:
    drawn["flip"] = drawn["flip"] & (torch.rand(COUNT, generator=generator(1)) < 0.9)


def flips_tied_to_the_offset(drawn: Drawn) -> None:
    drawn["flip"] = drawn["offset"][:, 1] % 2 == 0


def centres_short_of_the_last_row(drawn: Drawn) -> None:
    drawn["centre"] = drawn["centre"] * (SIZE - 1) // SIZE  # 0..30 instead of 0..31


def centres_that_are_never_clipped(drawn: Drawn) -> None:
    drawn["centre"] = drawn["centre"].clamp(CUTOUT // 2, SIZE - CUTOUT // 2)


def centres_tied_to_the_offset(drawn: Drawn) -> None:
    shifted = drawn["centre"] + drawn["offset"]
    drawn["centre"] = shifted % SIZE // 8 * 8 + drawn["offset"] % 8  # uniform or nearly, but tied


@pytest.mark.parametrize(
    "mutate",
    [
        narrow_offsets,
        one_offset_for_both_axes,
        flips_of_45_percent,
        flips_tied_to_the_offset,
        centres_short_of_the_last_row,
        centres_that_are_never_clipped,
        centres_tied_to_the_offset,
    ],
)
def test_the_same_tests_refuse_a_wrong_draw(
    theirs: Changes, mutate: Callable[[Drawn], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = nas.data.draw

    def wrong(*arguments: object) -> Drawn:
        drawn = right(*arguments)
        mutate(drawn)
        return drawn

    monkeypatch.setattr(nas.data, "draw", wrong)
    assert not accepted(cifar_p_values(changes(our_cifar()), theirs))


def test_the_reading_refuses_another_border_and_another_square(monkeypatch: pytest.MonkeyPatch) -> None:
    pad = torch.nn.functional.pad
    with monkeypatch.context() as patch:
        patch.setattr(nas.data.F, "pad", lambda images, sides: pad(images, sides, value=1))
        with pytest.raises(AssertionError):
            changes(our_cifar())
    right = nas.data.cut_out
    for wrong in (
        lambda images, size, centre: right(images, size + 2, centre),
        lambda images, size, centre: right(images, size, centre) + (right(images * 0 + 1, size, centre) == 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(nas.data, "cut_out", wrong)
            with pytest.raises(AssertionError):
                changes(our_cifar())


# RandomResizedCrop: boxes as drawn for many shapes, and as read off images in memory and from files.


def box_p_values(ours: np.ndarray, theirs: np.ndarray) -> PValues:
    """Of boxes (N, 4) as (top, left, height, width)."""

    def measures(found: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = found.T
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "area": height * width,
            "ratio": width / height,
            "middle row": top + height / 2,
            "middle column": left + width / 2,
        }

    pairs = zip(measures(ours).items(), measures(theirs).values(), strict=True)
    return {name: float(stats.ks_2samp(mine, other).pvalue) for (name, mine), other in pairs}


def their_boxes(height: int, width: int, count: int) -> np.ndarray:
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = transforms.RandomResizedCrop.get_params
        return np.array([params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float)


@pytest.mark.parametrize("shape", [(224, 224), (375, 500), (500, 333), (64, 64), (60, 200), (200, 40)])
def test_boxes_are_distributed_as_torchvision_draws_them(shape: tuple[int, int]) -> None:
    uniform = torch.rand(6000, nas.files.CROP_DRAWS, generator=generator(0)).numpy()
    p_values = box_p_values(nas.files.boxes(uniform, *shape), their_boxes(*shape, 6000))
    assert accepted(p_values), p_values


SIDE, BOXES = 64, 2000


def ramps() -> np.ndarray:
    """An image (S, S, 3) whose first two channels are 4 x row and 4 x column."""
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    return (4 * np.stack([rows, columns, rows * 0], axis=2)).astype(np.uint8)


def read_boxes(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) and mirroring (N,) of ramps (N, 3, S, S); scaling bends them only at their ends."""
    raw = (images * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255 / 4
    columns, rows = raw[:, 1].mean(axis=1), raw[:, 0].mean(axis=2)
    flip = columns[:, SIDE // 4] > columns[:, SIDE // 2]
    columns = np.where(flip[:, None], columns[:, ::-1], columns)
    middle = slice(SIDE // 8, SIDE - SIDE // 8)
    place = (np.arange(SIDE) + 0.5)[middle] / SIDE  # in the box, from 0 to 1
    found = []
    for values in (rows, columns):
        length, start = np.polyfit(place, values[:, middle].T, 1)
        found.append((np.rint(start + 0.5), np.rint(length)))
    (top, height), (left, width) = found
    return np.stack([top, left, height, width], axis=1), flip.astype(int)


@pytest.fixture(scope="module")
def plain_crops() -> tuple[np.ndarray, np.ndarray]:
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = Image.fromarray(ramps())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return read_boxes(torch.stack([recipe(image) for _ in range(BOXES)]).numpy())


@pytest.mark.parametrize("flip", [False, True])
def test_the_reading_knows_the_boxes(flip: bool) -> None:
    image = Image.fromarray(ramps())
    drawn = nas.files.boxes(torch.rand(50, nas.files.CROP_DRAWS, generator=generator(3)).numpy(), SIDE, SIDE)
    crops = [vision.resized_crop(image, *box, [SIDE, SIDE]) for box in drawn.astype(int).tolist()]
    shown = torch.stack([vision.to_tensor(vision.hflip(crop) if flip else crop) for crop in crops])
    found, flips = read_boxes(transforms.Normalize(MEAN, STD)(shown).numpy())
    assert np.array_equal(found, drawn)
    assert set(flips) == {int(flip)}


def our_crops(path: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images: np.ndarray | Files = np.repeat(ramps().transpose(2, 0, 1)[None], BOXES, axis=0)
    if path == "streamed":
        Image.fromarray(ramps()).save(folder / "ramps.png")
        images = Files(str(folder), np.repeat(np.array([b"ramps.png"]), BOXES), SIDE)
    batches = served(images, Augment(flip=True, resized_crop=True), SIDE)
    return read_boxes(torch.cat(list(batches)).numpy())


def crop_p_values(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> PValues:
    found = box_p_values(ours[0], theirs[0])
    found["mirrored as often"] = same_law(ours[1], theirs[1], 2)
    found["mirroring and box independent"] = independent(ours[1], ours[0][:, 1] > SIDE / 8)
    return found


@pytest.mark.parametrize("path", ["memory", "streamed"])
def test_crops_read_off_the_images_are_distributed_as_torchvision_makes_them(
    path: str, plain_crops: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    p_values = crop_p_values(our_crops(path, tmp_path), plain_crops)
    assert accepted(p_values), p_values


Boxes = Callable[[np.ndarray, int, int], np.ndarray]


def areas_from_20_percent(right: Boxes, uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    raised = uniform.copy()
    raised[:, :10] = (0.12 + 0.8 * uniform[:, :10]) / 0.92
    return right(raised, height, width)


def squares_only(right: Boxes, uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    square = uniform.copy()
    square[:, 10:20] = 0.5
    return right(square, height, width)


def corners_short_of_the_far_end(right: Boxes, uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    near = uniform.copy()
    near[:, 20:] *= 0.9
    return right(near, height, width)


@pytest.mark.parametrize("mutate", [areas_from_20_percent, squares_only, corners_short_of_the_far_end])
def test_the_same_tests_refuse_wrong_boxes(
    mutate: Callable[[Boxes, np.ndarray, int, int], np.ndarray],
    plain_crops: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = nas.files.boxes
    monkeypatch.setattr(nas.files, "boxes", lambda *arguments: mutate(right, *arguments))
    assert not accepted(crop_p_values(our_crops("streamed", tmp_path), plain_crops))
