"""Packing: how many trials share a machine, what each is given, and what the user is told."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from experiments import packing
from experiments.packing import Machine, Node, Packing, Share
from experiments.study import Planned, Resources
from nas.footprint import DataShape, Footprint, Peak
from nas.papers import PAPERS
from nas.trial import Trial

DIGITS = DataShape(channels=1, image_size=8, classes=10)
GB = 1024.0


def of_k(k: int) -> Trial:
    """A trial whose footprint here follows from K."""
    base = PAPERS["pc_darts"]
    supernet = replace(base.method.supernet, partial_channels=k)
    return replace(base, method=replace(base.method, supernet=supernet))


@pytest.fixture(autouse=True)
def _footprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 16 GB at K=1, 4 GB at K=4, 2 GB at K=8, and processes that take nothing else."""

    def footprint(trial: Trial, shape: DataShape) -> Footprint:
        peak = Peak(16 * GB / trial.method.supernet.partial_channels, 0)
        return Footprint((peak,), Peak(0, 0))

    monkeypatch.setattr(packing, "footprint", footprint)
    monkeypatch.setattr("nas.footprint.PROCESS_MB", 0.0)
    monkeypatch.setattr("nas.footprint.RETAINED", 1.0)


def node(cpus: float = 8, gpus: float = 0, memory: float = 64, free: float = 90) -> Node:
    return Node(cpus, gpus, memory * GB, free * GB)


def on(*nodes: Node, gpu: float | None = None, grows: bool = False, **resources: float) -> Packing:
    """Packing on machines of these many GB."""
    memory = None if gpu is None else gpu * GB
    return Packing(Resources(**resources), Machine(nodes, memory, grows), DIGITS)  # type: ignore[arg-type]


def planned(*ks: int) -> list[Planned]:
    return [Planned(f"K={k}", f"K={k}", {}, of_k(k)) for k in ks]


def test_a_trial_has_one_thread_even_where_cores_are_left_over() -> None:
    share = on(node(cpus=64)).share(of_k(4))
    assert (share.cpus, share.threads) == (1, 1)


def test_a_cluster_of_no_workers_is_waited_for() -> None:
    (line,) = on(node(cpus=0), grows=True, gpus_per_trial=1.0).describe(planned(4), 3)
    assert line == (
        "packing: trials start when a node joins that has room for one, 1 thread and a GPU each; "
        "a trial needs up to about 5.0 GB (K=4)"
    )
    assert on(node(), grows=True).describe(planned(4), 3)[0].startswith("packing: 3 trials at once, ")


def test_cores_given_by_the_user_are_threads() -> None:
    assert on(node(), cpus_per_trial=4).share(of_k(4)).threads == 4
    assert on(node(), cpus_per_trial=0.5).share(of_k(4)).threads == 1


def test_a_trial_asks_for_the_memory_of_its_own_configuration() -> None:
    shares = [on(node()).share(of_k(k)).memory_mb for k in (1, 4, 8)]
    assert shares == [16 * GB, 4 * GB, 2 * GB]


@pytest.mark.parametrize("needed", [1.0, 923.0, 998.0, 1025.0, 11_179.0])
def test_memory_is_rounded_up_a_little(needed: float) -> None:
    assert needed <= packing._rounded(needed) <= 1.25 * needed


def test_like_trials_ask_for_equal_shares() -> None:
    # Laptop trials on digits of K = 8 and of K = 1: a process that ran one can run the other.
    assert packing._rounded(923) == packing._rounded(998)


@pytest.mark.parametrize(
    ("nodes", "k", "expected"),
    [
        ([node(cpus=8)], 8, 8),  # cores
        ([node(cpus=8)], 1, 4),  # memory
        ([node(cpus=8), node(cpus=8, memory=20)], 1, 5),  # a trial lies on one node
        ([node(cpus=0), node(cpus=2)], 8, 2),  # the head of a cluster runs none
    ],
)
def test_as_many_run_at_once_as_cores_and_memory_allow(nodes: Sequence[Node], k: int, expected: int) -> None:
    assert on(*nodes).at_once([of_k(k)], 100) == (expected, expected)


def test_no_more_run_at_once_than_there_are_or_may() -> None:
    assert on(node()).at_once([of_k(8)], 3) == (3, 3)
    assert on(node(), max_concurrent=2).at_once([of_k(8)], 100) == (2, 2)


def test_a_mixed_study_runs_fewer_of_the_large_trials() -> None:
    assert on(node()).at_once([of_k(1), of_k(8)], 100) == (4, 8)


def test_a_bundle_holds_what_ray_is_asked_for() -> None:
    assert Share(cpus=1, gpus=0, memory_mb=512).bundle == {"CPU": 1, "memory": 512 * 2**20}
    assert Share(cpus=2, gpus=0.5, memory_mb=1).bundle == {"CPU": 2, "GPU": 0.5, "memory": 2**20}


# GPUs


def test_a_gpu_is_used_where_there_is_one_and_packed_by_memory() -> None:
    # 0.9 x 40 GB holds 2 trials of 16 + 1 GB, and of smaller ones as many as may share one unasked.
    with_gpu = on(node(gpus=1), gpu=40)
    assert [with_gpu.share(of_k(k)).gpus for k in (1, 4, 8)] == [1 / 2, 1 / 4, 1 / 4]
    assert with_gpu.at_once([of_k(1)], 100) == (2, 2)


def test_thirds_of_a_gpu_fit_three_times() -> None:
    thirds = on(node(gpus=2), gpu=60)
    assert thirds.share(of_k(1)).gpus == pytest.approx(1 / 3)
    assert thirds.at_once([of_k(1)], 100) == (6, 6)


def test_a_gpu_of_unknown_memory_runs_one_trial() -> None:
    assert on(node(gpus=1), grows=True).share(of_k(8)).gpus == 1


def test_zero_gpus_means_cpus() -> None:
    assert on(node(gpus=1), gpu=40, gpus_per_trial=0).share(of_k(4)).gpus == 0


def test_a_share_given_by_the_user_stays() -> None:
    assert on(node(gpus=1), gpu=40, gpus_per_trial=1).share(of_k(8)).gpus == 1


# A joint search


def test_any_trial_of_a_joint_search_fits_its_share() -> None:
    assert on(node()).largest([of_k(8), of_k(1)]).memory_mb == 16 * GB
    assert on(node(gpus=1), gpu=40).largest([of_k(8), of_k(1)]).gpus == 1 / 2


def test_slots_follow_the_machine_and_a_cluster_may_grow() -> None:
    assert on(node()).slots([of_k(8)]) == 8
    assert on(node(), max_concurrent=3).slots([of_k(8)]) == 3
    assert on(node(cpus=2), grows=True).slots([of_k(8)]) == 8
    assert on(grows=True).slots([of_k(8)]) == 8


# What the user is told


def test_the_packing_is_said_in_one_line() -> None:
    assert on(node(cpus=2)).describe(planned(8, 1, 4), 20) == [
        "packing: 2 trials at once, 1 thread each; a trial needs up to about 16.0 GB (K=1), "
        "this machine has 64.0 GB for them"
    ]
    assert on(node(gpus=1), gpu=40).describe(planned(8, 1), 20) == [
        "packing: 2 to 4 trials at once, 1 thread and 0.5 of a GPU each; a trial needs up to about 17.0 GB "
        "(K=1), this machine has 20.0 GB for them"
    ]


def test_a_trial_that_may_not_fit_is_warned_of_and_still_starts() -> None:
    # More than Ray hands out, and less than is free.
    tight = on(node(memory=12, free=20))
    assert tight.share(of_k(1)).memory_mb == 12 * GB
    line, warning = tight.describe(planned(1, 8), 20)
    assert line.startswith("packing: 1 to 6 trials at once")
    assert warning.startswith("warning: K=1 may need 16.0 GB, more than the 12.0 GB there are")
    assert "batch_size" in warning


def test_a_search_that_cannot_fit_is_refused() -> None:
    def refusal(packing: Packing) -> str:
        message = r"K=1: its search holds 16\.0 GB of tensors .* lower .*batch_size"
        with pytest.raises(ValueError, match=message) as refused:
            packing.describe(planned(1, 8), 20)
        return str(refused.value)

    assert "this machine has 10.0 GB" in refusal(on(node(memory=7, free=10)))
    assert "a GPU has 12.0 GB" in refusal(on(node(gpus=1), gpu=12))
    assert "0.25 of a GPU has 10.0 GB" in refusal(on(node(gpus=1), gpu=40, gpus_per_trial=0.25))


def test_a_cluster_may_grow_larger_nodes() -> None:
    _, warning = on(node(memory=7, free=10), grows=True).describe(planned(1), 20)
    assert warning.startswith("warning: K=1")
    assert on(grows=True).describe(planned(1), 20)[0].startswith("packing: trials start when a node joins")


def test_a_share_that_may_be_too_small_is_warned_of() -> None:
    _, warning = on(node(gpus=1), gpu=32, gpus_per_trial=0.5).describe(planned(4, 1), 20)
    assert warning.startswith("warning: K=1 may need 17.0 GB, more than the 16.0 GB there are")
