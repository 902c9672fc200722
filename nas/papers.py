"""Papers: each published trial whole, and smaller versions of any trial.

`PAPERS` are the recipes as published, unabridged. `laptop` and `tiny` shrink a trial to minutes and to
seconds; both keep its method.
"""

from dataclasses import dataclass, replace

from nas.data import Augment, DataConfig
from nas.methods import METHODS
from nas.retrain import RetrainStage
from nas.schedule import Constant, Cosine, Exponential, LinearTail, Ramp, SkipDropout
from nas.search import SearchStage
from nas.spaces.cell import CellSpace
from nas.trial import Trial

_CIFAR10 = DataConfig(source="cifar10", valid=0.0, shuffle=False)
_CIFAR100 = replace(_CIFAR10, source="cifar100")
_IMAGENET = DataConfig(
    source="imagenet", valid=0.0, search_share=0.125, weights_share=0.8, image_size=224, stream=True
)
_IMAGENET_CROP = Augment(flip=True, resized_crop=True)

_DARTS_RETRAIN = RetrainStage()
_PC_DARTS_RETRAIN = RetrainStage(drop_path=Ramp(0.3))
_P_DARTS_RETRAIN = RetrainStage(batch_size=128, drop_path=Ramp(0.3))
_IMAGENET_RETRAIN = RetrainStage(
    epochs=250,
    cells=14,
    channels=48,
    batch_size=1024,
    lr=LinearTail(0.5, warmup=5),
    weight_decay=3e-5,
    auxiliary_norm=False,
    drop_path=Constant(0.0),
    label_smoothing=0.1,
    augment=Augment(flip=True, resized_crop=True, jitter=(0.4, 0.4, 0.4, 0.2)),
    stem="imagenet",
)

RECIPES = {
    "darts_cifar": _DARTS_RETRAIN,
    "pc_darts_cifar": _PC_DARTS_RETRAIN,
    "p_darts_cifar": _P_DARTS_RETRAIN,
    "gdas_cifar": RetrainStage(epochs=300, lr=Cosine(0.025, warmup=5), nesterov=True, weight_decay=5e-4),
    "pc_darts_imagenet": _IMAGENET_RETRAIN,
    "p_darts_imagenet": replace(
        _IMAGENET_RETRAIN, lr=LinearTail(0.5, warmup=5, warmup_of="current"), auxiliary_norm=True
    ),
    "darts_imagenet": replace(_IMAGENET_RETRAIN, batch_size=128, lr=Exponential(0.1, 0.97)),
}
"""Retraining recipes by name, as published."""

_DARTS_STAGE = SearchStage()
_PC_DARTS_STAGE = SearchStage(frozen_epochs=15, batch_size=256, lr=Cosine(0.1))


def p_darts_stages(dropout: tuple[float, float, float] = (0.0, 0.4, 0.7)) -> tuple[SearchStage, ...]:
    """The three stages of P-DARTS: 5, 11, 17 cells with 8, 5, 3 operations per edge.

    `dropout` after skips is the paper's for CIFAR-10; for CIFAR-100 it says 0.1, 0.2, 0.3, and its code's
    README 0.1, 0.4, 0.7.
    """
    base = SearchStage(epochs=25, frozen_epochs=10, batch_size=96, lr=Cosine(0.025))
    return tuple(
        replace(base, cells=cells, keep=keep, skip_dropout=SkipDropout(p, base.frozen_epochs))
        for cells, keep, p in zip((5, 11, 17), (5, 3, None), dropout, strict=True)
    )


GDAS_OPS = (
    "none",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "avg_pool_3x3",
    "max_pool_3x3",
)
"""The operations of DARTS in the order of the GDAS code, which decides between equals."""

PAPERS = {
    "darts_1st": Trial(
        data=_CIFAR10, method=METHODS["darts_1st"], search=(_DARTS_STAGE,), retrain=_DARTS_RETRAIN
    ),
    "darts_2nd": Trial(
        data=_CIFAR10, method=METHODS["darts_2nd"], search=(_DARTS_STAGE,), retrain=_DARTS_RETRAIN
    ),
    "pc_darts": Trial(
        data=_CIFAR10, method=METHODS["pc_darts"], search=(_PC_DARTS_STAGE,), retrain=_PC_DARTS_RETRAIN
    ),
    "pc_darts_imagenet": Trial(
        data=_IMAGENET,
        method=METHODS["pc_darts_imagenet"],
        search=(
            replace(
                _PC_DARTS_STAGE,
                frozen_epochs=35,
                batch_size=1024,
                lr=Cosine(0.5, warmup=5),
                augment=_IMAGENET_CROP,
                stem="imagenet",
            ),
        ),
        retrain=RECIPES["pc_darts_imagenet"],
    ),
    "p_darts": Trial(
        data=_CIFAR10, method=METHODS["p_darts"], search=p_darts_stages(), retrain=_P_DARTS_RETRAIN
    ),
    "p_darts_cifar100": Trial(
        data=_CIFAR100,
        method=METHODS["p_darts"],
        search=p_darts_stages((0.1, 0.2, 0.3)),
        retrain=_P_DARTS_RETRAIN,
    ),
    "gdas": Trial(
        space=CellSpace(name="gdas", ops=GDAS_OPS),
        data=_CIFAR10,
        method=METHODS["gdas"],
        search=(
            SearchStage(
                epochs=250,
                cells=6,
                batch_size=256,
                lr=Cosine(0.025, 0.001),
                lr_per_batch=True,
                nesterov=True,
                weight_decay=5e-4,
            ),
        ),
        retrain=RECIPES["gdas_cifar"],
    ),
    "random": Trial(data=_CIFAR10, method=METHODS["random"], search=(), retrain=_DARTS_RETRAIN),
}
"""Trials by paper, with the published recipes; docs/methods.md says where each differs from the paper."""


def laptop(trial: Trial) -> Trial:
    """`trial` at a size of minutes on two cores and 8x8 images: its method, fewer epochs, cells and channels.

    Widths, depths and epochs keep their proportions between stages; a part of the images is held out.
    """
    return _shrunk(trial, _Size(search_epochs=6, retrain_epochs=10, cells=4, batch_size=64))


def tiny(trial: Trial) -> Trial:
    """`trial` at a size of seconds, for tests and to try a command."""
    return _shrunk(trial, _Size(search_epochs=3, retrain_epochs=3, cells=3, batch_size=16, limit=200))


def on_digits(trial: Trial) -> Trial:
    """`trial` on the embedded 8x8 digits, shifted by a pixel; not mirrored, for that makes another digit."""
    augment = Augment(pad=1)
    return replace(
        trial,
        data=replace(trial.data, source="digits"),
        search=tuple(replace(stage, augment=augment) for stage in trial.search),
        retrain=replace(trial.retrain, augment=augment),
    )


_CELLS = 8
"""Cells of a published supernet; depths shrink in proportion, to no fewer than three."""


@dataclass(frozen=True)
class _Size:
    """What a shrunk trial comes down to."""

    search_epochs: int
    retrain_epochs: int
    cells: int
    batch_size: int
    channels: int = 8
    limit: int | None = None


def _shrunk(trial: Trial, size: _Size) -> Trial:
    total = sum(stage.epochs for stage in trial.search)
    narrowest = min((stage.channels for stage in trial.search), default=1)
    stages = []
    for stage in trial.search:
        epochs = max(1, round(size.search_epochs * stage.epochs / total))
        frozen = min(epochs - 1, round(epochs * stage.frozen_epochs / stage.epochs))
        dropout = stage.skip_dropout
        stages.append(
            replace(
                stage,
                epochs=epochs,
                frozen_epochs=frozen,
                cells=max(3, round(size.cells * stage.cells / _CELLS)),
                channels=size.channels * stage.channels // narrowest,
                batch_size=size.batch_size,
                lr=Cosine(0.05),
                skip_dropout=replace(dropout, frozen_epochs=frozen)
                if isinstance(dropout, SkipDropout)
                else dropout,
                augment=Augment(pad=4, flip=True),
                stem="cifar",
            )
        )
    retrain = replace(
        trial.retrain,
        epochs=size.retrain_epochs,
        cells=size.cells,
        channels=size.channels,
        batch_size=size.batch_size,
        lr=Cosine(0.05),
        auxiliary_weight=0.0,
        drop_path=Constant(0.0),
        augment=Augment(pad=4, flip=True),
        stem="cifar",
    )
    data = DataConfig(
        source=trial.data.source,
        limit=size.limit,
        test_limit=size.limit,
        root=trial.data.root,
        download=trial.data.download,
    )
    return replace(trial, data=data, search=tuple(stages), retrain=retrain)
