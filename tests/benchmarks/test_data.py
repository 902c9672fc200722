"""The data benchmark runs, names every pipeline, and compares pipelines that give the same kind of batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import data
from benchmarks.measure import Roofline, Timing
from nas.data import Data, DataConfig

SMALL = ("--rounds", "1", "--images", "40", "--files", "8", "--batch", "8", "--workers", "1")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_as_before")
def test_the_table_names_every_pipeline_of_both_cases(capsys: pytest.CaptureFixture[str]) -> None:
    data.main(SMALL)
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[0] == list(data.HEAD)
    assert [(case, name) for case, name, *_ in lines[1:]] == [
        ("memory", "ours, one process"),
        ("memory", "torchvision, PIL images"),
        ("memory", "torchvision, v2 on tensors"),
        ("folder", "ours, 1 threads"),
        ("folder", "Pillow decoding alone, 1 threads"),
        ("folder", "torchvision, PIL images"),
        ("folder", "torchvision, v2 on tensors"),
    ]
    for _, name, rate, ratio, share in lines[1:]:
        assert float(rate) > 0
        assert (ratio == "") == name.startswith("ours")
        assert 0 <= float(share.rstrip("%")) < 100


@pytest.mark.parametrize("kind", [data.PilImages, data.TensorImages])
def test_all_forms_give_images_of_one_shape_type_and_range(kind: type) -> None:
    arrays = data._made_up(30)
    served = data._epoch(Data(arrays, DataConfig(valid=0), 0, torch.device("cpu")), 8, data.CIFAR)
    ours, _ = next(served)
    image, label = kind(arrays)[3]
    assert image.shape == ours.shape[1:]
    assert image.dtype == ours.dtype
    assert label == 3
    # Black, the brightest, and what cutout leaves.
    for found in (image, ours):
        assert found.min() == pytest.approx((0 - 0.5) / 0.25, abs=0.1)
        assert found.max() == pytest.approx((1 - 0.5) / 0.25, abs=0.1)
        assert torch.any(found == 0)


def test_made_up_photographs_have_the_size_of_imagenets(tmp_path: Path) -> None:
    data.write_photos(tmp_path, 2)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [file.parent.name for file in files] == ["ant", "bee"]
    assert all(60_000 < file.stat().st_size < 180_000 for file in files)  # ImageNet's mean is about 110 kB


def test_a_rate_counts_images_and_its_bound_reads_and_writes_each_number_once() -> None:
    times = {"ours": Timing((1.0, 2.0, 3.0)), "plain": Timing((4.0, 8.0, 6.0))}
    rows = data._rows("memory", times, 100, 1000, Roofline(1.0, 8e5))
    assert rows[0] == ["memory", "ours", "50", "", "50.0%"]
    assert rows[1] == ["memory", "plain", "17", "3.00 (2.00-4.00)", "16.7%"]
