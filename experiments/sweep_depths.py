"""Do progressively deeper supernets find better cells than one of a fixed depth, epochs being equal?"""

from dataclasses import replace

from experiments.main import main
from experiments.study import Axis, Study
from nas.papers import PAPERS, p_darts_stages
from nas.search import SearchStage

P_DARTS = p_darts_stages()
PLAIN = p_darts_stages((0.0, 0.0, 0.0))
TOTAL = sum(stage.epochs for stage in PLAIN)
FROZEN = sum(stage.frozen_epochs for stage in PLAIN)


def single(cells: int) -> tuple[SearchStage, ...]:
    """One stage over all operations, as long as the three of P-DARTS together."""
    return (replace(PLAIN[0], cells=cells, keep=None, epochs=TOTAL, frozen_epochs=FROZEN),)


DEPTHS = {
    "8": single(8),
    "17": single(17),
    "5-11-17": PLAIN,
    "5-11-17 wider": tuple(replace(s, channels=c) for s, c in zip(PLAIN, (16, 28, 40), strict=True)),
    "5-11-17 dropout": P_DARTS,
}
"""Schedules of stages by their cells; `wider` adds 12 channels a stage, `dropout` is P-DARTS as published."""

STUDY = Study(
    name="sweep_depths",
    question=__doc__,
    base=PAPERS["p_darts"],
    axes=(Axis("depths", {name: {"search": stages} for name, stages in DEPTHS.items()}),),
    reference="depths=8",
    note="All arms but the last search without dropout after skips, so that depth is what differs; stages "
    "also restart the learning rate and drop operations, as those of P-DARTS do.",
)

if __name__ == "__main__":
    main(STUDY)
