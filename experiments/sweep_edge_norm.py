"""Does edge normalisation change the final error of what PC-DARTS finds?"""

from experiments.main import main
from experiments.study import Study, axis
from nas.papers import PAPERS

STUDY = Study(
    name="sweep_edge_norm",
    question=__doc__,
    base=PAPERS["pc_darts"],
    axes=(axis("edge_norm", False, True),),
    reference="edge_norm=False",
)

if __name__ == "__main__":
    main(STUDY)
