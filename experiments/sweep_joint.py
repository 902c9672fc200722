"""Which K, edge normalisation, depths, skip cap and learning rates err least together in validation?"""

from dataclasses import replace

from experiments.main import main
from experiments.study import Domain, Study
from experiments.sweep_depths import DEPTHS
from nas.papers import PAPERS

BASE = PAPERS["pc_darts"]

STUDY = Study(
    name="sweep_joint",
    question=__doc__,
    # The published recipe trains on every image; choosing needs some that are held out.
    base=replace(BASE, data=replace(BASE.data, valid=0.1)),
    joint={
        "depths": Domain(("8", "5-11-17")),
        "K": Domain((1, 2, 4, 8)),
        "edge_norm": Domain((False, True)),
        "M": Domain((1, 2, 3, 4, 8)),  # a normal cell has 8 operations, so 8 is no cap
        "lr": Domain(low=0.01, high=0.2),
        "arch_lr": Domain(low=1e-4, high=1e-2),
    },
    named={"depths": {name: DEPTHS[name] for name in ("8", "5-11-17")}},
)

if __name__ == "__main__":
    main(STUDY)
