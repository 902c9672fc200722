"""How does the final error depend on M, the number of skips that P-DARTS allows in the normal cell?"""

from experiments.main import main
from experiments.study import Study, axis
from nas.papers import PAPERS

STUDY = Study(
    name="sweep_skips",
    question=__doc__,
    base=PAPERS["p_darts"],
    axes=(axis("M", 0, 1, 2, 3, 4, None),),
    reference="M=None",
    note="The arms of one seed share their search, and where no skip is to spare also their cell; intervals "
    "and tests take them for independent, which is conservative. The random cells are not capped.",
)

if __name__ == "__main__":
    main(STUDY)
