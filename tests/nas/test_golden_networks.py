"""Derived networks against the public implementations: sizes, outputs, gradients, statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.costs import network_cost
from nas.network import Network, Stem, retrain_loss
from nas.published import PUBLISHED
from nas.spaces.cell import CellSpace
from nas.supernets.cell import CellSupernetConfig
from tests.golden import assert_close, cases, copy_into, document, load, network_tensors, recordings

TOLERANCE = 1e-11
FILE = "network_params.json"
IMAGE_SIZE: dict[Stem, int] = {"cifar": 32, "imagenet": 224}

# Weights without the auxiliary head, multiply-adds in millions: CIFAR-10, CIFAR-100 (36 channels, 20 cells),
# ImageNet (48 channels unless given, 14 cells). Counted on the public networks, GDAS_F1 by formula.
SIZES: dict[str, tuple[int, float | None, int | None, int, float | None]] = {
    "DARTS_V1": (3_169_414, 501.0, 3_221_344, 4_510_432, 505.9),
    "DARTS_V2": (3_349_342, 528.4, 3_401_272, 4_718_752, 529.9),
    "PC_DARTS_cifar": (3_634_678, 556.7, 3_686_608, 5_270_560, 571.1),
    "PC_DARTS_image": (3_721_510, 570.5, 3_773_440, 5_342_464, 581.6),
    "PDARTS": (3_433_798, 532.2, 3_485_728, 4_944_352, 542.8),
    "GDAS_V1": (3_368_782, 519.4, 3_420_712, 5_345_075, 581.0),
    "GDAS_F1": (2_543_014, None, None, 4_430_386, None),
    "SNAS_mild": (2_661_382, 422.2, 2_713_312, 3_939_328, 438.0),
    "SNAS_moderate": (2_847_358, 440.7, 2_899_288, 4_312_576, 465.6),
    "NASNet": (3_830_950, 603.5, 3_895_840, 5_564_320, 604.0),
    "AmoebaNet": (3_145_078, 488.9, 3_184_048, 4_627_360, 526.7),
}
IMAGENET_CHANNELS = {"GDAS_V1": 50, "GDAS_F1": 52}


def build(genotype: str, stem: Stem, **settings: Any) -> Network:
    """Network without storage: enough to count, and to follow shapes through."""
    with torch.device("meta"):
        return Network(PUBLISHED[genotype], stem=stem, **settings)


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted_madds(network: Network, image_size: int) -> int:
    """Multiply-adds of convolutions and the linear layer, from the shapes that go through them."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    return total


def name_of(row: dict[str, Any]) -> str:
    return f"{row['genotype']}-{row['family']}-{row['channels']}-{row['classes']}"


@pytest.mark.parametrize("row", cases(FILE, "networks", name_of))
def test_size_of_the_public_network(row: dict[str, Any]) -> None:
    settings = {name: row[name] for name in ("channels", "cells", "classes")}
    stem: Stem = row["family"]
    cost = network_cost(PUBLISHED[row["genotype"]], stem=stem, image_size=IMAGE_SIZE[stem], **settings)
    assert (cost.params, cost.madds) == (row["params"], row["macs_conv_linear"])

    second_norm = stem == "cifar" or "pdarts" in row["code"]
    network = build(row["genotype"], stem, auxiliary=True, auxiliary_norm=second_norm, **settings)
    assert network.auxiliary is not None
    assert weights(network) == row["params_with_auxiliary"]
    assert weights(network) - weights(network.auxiliary) == row["params"]


@pytest.mark.parametrize(
    "row", cases(FILE, "supernets", lambda row: f"{row['method']}-K{row['partial_k']}-L{row['cells']}")
)
def test_size_of_the_public_supernet(row: dict[str, Any]) -> None:
    space = CellSpace()
    with torch.device("meta"):
        supernet = CellSupernetConfig(partial_channels=row["partial_k"]).build(
            space,
            space.choices,
            cells=row["cells"],
            channels=row["channels"],
            classes=row["classes"],
            stem="imagenet" if "ImageNet" in row["method"] else "cifar",
        )
    assert weights(supernet) == row["params"]


def test_published_genotypes_are_those_of_the_public_code() -> None:
    if cases(FILE, "networks", name_of)[0].id == "missing":
        pytest.skip("golden data not found")
    for name, recorded in document(FILE)["genotypes"].items():
        for cell in ("normal", "reduce"):
            ours = getattr(PUBLISHED[name], cell)
            assert [[op, source] for inputs in ours.nodes for op, source in inputs] == recorded[cell], name
            assert list(ours.concat) == recorded[f"{cell}_concat"], name


@pytest.mark.parametrize("genotype", SIZES)
def test_size_of_published_network(genotype: str) -> None:
    cifar10, cifar_madds, cifar100, imagenet, imagenet_madds = SIZES[genotype]
    cell = PUBLISHED[genotype]
    ten = network_cost(cell, channels=36, cells=20, classes=10, image_size=32)
    assert ten.params == cifar10
    assert cifar_madds is None or round(ten.madds / 1e6, 1) == cifar_madds
    hundred = network_cost(cell, channels=36, cells=20, classes=100, image_size=32)
    assert cifar100 is None or hundred.params == cifar100
    channels = IMAGENET_CHANNELS.get(genotype, 48)
    large = network_cost(cell, channels=channels, cells=14, classes=1000, image_size=224, stem="imagenet")
    assert large.params == imagenet
    assert imagenet_madds is None or round(large.madds / 1e6, 1) == imagenet_madds


@pytest.mark.parametrize("genotype", PUBLISHED)
@pytest.mark.parametrize(("stem", "image_size"), [("cifar", 29), ("imagenet", 201)])
def test_cost_counts_what_the_network_computes(genotype: str, stem: Stem, image_size: int) -> None:
    network = build(genotype, stem, channels=8, cells=4, classes=10)
    cost = network_cost(
        PUBLISHED[genotype], channels=8, cells=4, classes=10, image_size=image_size, stem=stem
    )
    assert cost.params == weights(network)
    assert cost.madds == counted_madds(network, image_size)


@pytest.mark.parametrize("path", recordings("network_"))
def test_network_is_the_public_one(path: Path) -> None:
    recording = load(path)
    meta = recording.meta
    network = Network(
        PUBLISHED[meta["genotype"]],
        channels=meta["channels"],
        cells=meta["cells"],
        classes=meta["classes"],
        stem=meta["family"],
        auxiliary=True,
        auxiliary_norm=meta["auxiliary_second_bn"],
    ).double()
    assert network.auxiliary is not None
    assert network.auxiliary_position == meta["auxiliary_cell"]
    assert weights(network) == meta["params_with_auxiliary"]
    assert weights(network) - weights(network.auxiliary) == meta["params_without_auxiliary"]
    copy_into(network_tensors(network), recording.under("param/") | recording.under("buffer/"))
    if meta["family"] == "cifar":
        images = recording["data/input"]
    else:
        images = F.interpolate(recording["data/input_quarter"], scale_factor=4, mode="nearest")

    network.eval()
    evaluated, none = network(images)
    assert none is None
    network.train()
    trained, auxiliary = network(images)
    loss = retrain_loss(
        trained, auxiliary, recording["data/label"], auxiliary_weight=meta["auxiliary_weight"], smoothing=0.0
    )
    out = {
        "logits_eval": evaluated,
        "logits_train": trained,
        "aux_logits_train": auxiliary,
        "loss_train_with_aux_0.4": loss,
    }
    assert_close(out, recording.under("out/"), TOLERANCE)
    torch.autograd.backward(loss)
    assert_close(
        network_tensors(network, lambda tensor: tensor.grad), recording.under("grad/param/"), TOLERANCE
    )
    assert_close(network_tensors(network), recording.under("after/buffer/"), TOLERANCE)
