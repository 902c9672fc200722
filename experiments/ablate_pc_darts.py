"""What do partial channels and edge normalisation do to the error, and what seen in a search tells it?"""

from dataclasses import replace

from experiments.main import main
from experiments.study import Study, axis
from nas.papers import PAPERS

STUDY = Study(
    name="ablate_pc_darts",
    question=__doc__,
    base=replace(
        PAPERS["pc_darts"],
        measure=("descriptors", "alignment", "eigenvalue", "proxies"),
        measure_every=2,  # as often as Zela et al. do
    ),
    axes=(axis("K", 1, 4), axis("edge_norm", False, True)),
    reference="K=1 edge_norm=False",  # DARTS of first order
    # The two that the literature names (supernet error, curvature), and the two that any other has to beat.
    primary=("search_valid_error", "search_eigenvalue", "params_m", "skips"),
)

if __name__ == "__main__":
    main(STUDY)
