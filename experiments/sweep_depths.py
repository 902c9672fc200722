"""Do progressively deeper supernets find better cells than one of a fixed depth, epochs being equal?"""

from dataclasses import replace

from experiments.main import main
from experiments.study import Axis, Study
from nas.papers import PAPERS, p_darts_stages
from nas.search import SearchStage

P_DARTS = p_darts_stages()
TOTAL = sum(stage.epochs for stage in P_DARTS)
FROZEN = sum(stage.frozen_epochs for stage in P_DARTS)


def single(cells: int) -> tuple[SearchStage, ...]:
    """One stage over all operations, as long as the three of P-DARTS together."""
    return (replace(P_DARTS[0], cells=cells, keep=None, epochs=TOTAL, frozen_epochs=FROZEN),)


DEPTHS = {
    "8": single(8),
    "17": single(17),
    "5-11-17": P_DARTS,
    "5-11-17 wider": tuple(replace(s, channels=c) for s, c in zip(P_DARTS, (16, 28, 40), strict=True)),
}
"""Schedules of stages by their cells; the last one adds 12 channels a stage."""

STUDY = Study(
    name="sweep_depths",
    question=__doc__,
    base=PAPERS["p_darts"],
    axes=(Axis("depths", {name: {"search": stages} for name, stages in DEPTHS.items()}),),
    reference="depths=8",
)

if __name__ == "__main__":
    main(STUDY)
