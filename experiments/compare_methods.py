"""Which method finds the better cells when all are retrained alike, and is any better than random?"""

from experiments.main import main
from experiments.study import Axis, Study
from nas.papers import PAPERS

METHODS = ("darts_1st", "darts_2nd", "pc_darts", "p_darts", "gdas")
"""Papers with a recipe for CIFAR-10, each with its own space and search; random is the study's baseline."""

STUDY = Study(
    name="compare_methods",
    question=__doc__,
    base=PAPERS["darts_1st"],
    axes=(
        Axis(
            "method",
            {
                name: {
                    "space": PAPERS[name].space,
                    "method": PAPERS[name].method,
                    "search": PAPERS[name].search,
                }
                for name in METHODS
            },
        ),
    ),
)

if __name__ == "__main__":
    main(STUDY)
