"""What does PC-DARTS lose or gain in final error by searching on 1/K of the channels?"""

from experiments.main import main
from experiments.study import Study, axis
from nas.papers import PAPERS

STUDY = Study(
    name="sweep_k",
    question=__doc__,
    base=PAPERS["pc_darts"],
    axes=(axis("K", 1, 2, 4, 8),),
    reference="K=1",
)

if __name__ == "__main__":
    main(STUDY)
