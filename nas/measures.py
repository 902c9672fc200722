"""Measures: what can be measured of a search besides `METRICS`, switched on by name, each with its seconds.

`Trial.measure` names them. A measure gives columns of the epoch's row, and `<measure>_seconds`; nothing that
a search does afterwards depends on it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.curvature import QUANTILES, Hessian, interval, lanczos, spectrum
from nas.gates import Gate, Gates, detached
from nas.genotype import OPERATIONS, Genotype, jaccard
from nas.metrics import FINAL, METRICS, Metric, supernet_quality
from nas.proxies import BASELINES, PROXIES, STATUSES, Proxy
from nas.samplers import Arch, Gumbel
from nas.spaces.cell import CELL_TYPES
from nas.stability import hamming, rank_tau
from nas.state import Batch, SearchState, frozen, without_statistics
from nas.streams import generator
from nas.supernets.stacked import CONV_OPS

Values = dict[str, float | None]
Part = Literal["held_out", "weights"]

_logger = logging.getLogger(__name__)

CURVATURE_BATCHES, CURVATURE_BATCH = 3, 64
"""Batches over which curvature and gradients are averaged, and images of each."""

PERTURBATION_IMAGES, PERTURBATION_BATCH = 1024, 128
"""Most held-out images that a perturbation is judged by, and images of a batch."""

CHANGED_EPOCHS = 5
"""Epochs over which `stability` looks for another likeliest operation."""


@dataclass(frozen=True)
class Snapshot:
    """What a search stood at after an epoch."""

    genotype: Genotype
    probabilities: dict[str, Tensor]
    """By table of choices, (rows, options)."""
    eigenvalue: float | None = None
    """What `eigenvalue` was, if measured."""


@dataclass(frozen=True)
class View:
    """A search after an epoch, as a measure sees it."""

    state: SearchState
    genotype: Genotype
    """What the search would give now."""
    metrics: Values
    """What is known of the epoch already."""
    gates: Callable[[], Gates]
    """Gates differentiable in the logits, the same draw at each call."""
    batches: Callable[[Part, int, int], Iterator[Batch]]
    """Images without augmentation in one order for all epochs, by part, batch size and most batches.

    All batches are equally large: smaller than asked for where the part has too few images."""
    seed: int
    history: dict[int, Snapshot] = field(default_factory=dict)
    """The epochs before in the same stage, by number from 0."""

    @property
    def relaxed(self) -> bool:
        """Whether a loss under the sampler's gates is differentiable in the architecture parameters."""
        sampler = self.state.sampler
        return not (isinstance(sampler, Gumbel) and sampler.hard)


@dataclass(frozen=True)
class Measure:
    """Something that can be measured of a search."""

    columns: dict[str, Metric]
    compute: Callable[[View], Values]
    when: Literal["always", "every", "last"] = "always"
    """After each epoch; after every so many (`Trial.measure_every`), since it runs the supernet; or once,
    after the last epoch of a stage, since it takes longer than an epoch."""

    @property
    def runs(self) -> bool:
        """Whether it runs the supernet, which may give no number: a column says what became of it."""
        return self.when != "always"


# --- descriptors of the architecture parameters and of the genotype -----------------------------------------


def _decisions(arch: Arch, kind: str) -> Iterator[tuple[str, list[float], list[str]]]:
    """(table, probabilities, options) of each row that has something to decide."""
    for name, p in arch.probabilities().items():
        if not name.endswith(kind):
            continue
        table = arch.choices[name]
        for row, allowed in zip(p.tolist(), table.allowed, strict=True):
            if len(allowed) > 1:
                yield name, [row[option] for option in allowed], [table.options[o] for o in allowed]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def entropy(p: Sequence[float]) -> float:
    """Of probabilities, over that of equal ones; from 0 to 1."""
    return -math.fsum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def gini(p: Sequence[float]) -> float:
    """Gini coefficient over its largest value, 0 for equal shares and 1 where one has all.

    Without the factor n / (n - 1) the coefficient of n shares is at most (n - 1) / n.
    """
    count = len(p)
    ranked = math.fsum((2 * rank - count - 1) * x for rank, x in enumerate(sorted(p), start=1))
    return ranked / ((count - 1) * math.fsum(p))


def alphas(view: View) -> Values:
    """How the operations stand."""
    edges = list(_decisions(view.state.arch, "/op"))
    with_op = [
        [x for x, op in zip(p, ops, strict=True) if op != "none"] for _, p, ops in edges if "none" in ops
    ]
    rest = [[x / math.fsum(p) for x in p] for p in with_op if len(p) > 1]
    by_cell = {cell: [entropy(p) for name, p, _ in edges if name.startswith(cell)] for cell in CELL_TYPES}
    return {
        "alpha_entropy_normal": _mean(by_cell["normal"]),
        "alpha_entropy_reduce": _mean(by_cell["reduce"]),
        "alpha_entropy_max": max((entropy(p) for _, p, _ in edges), default=None),
        "alpha_entropy_ops": _mean([entropy(p) for p in rest]),
        "none_mass": _mean([1 - math.fsum(p) for p in with_op]),
        "one_hot_distance": _mean([_to_one_hot(p) for _, p, _ in edges]),
    }


def _to_one_hot(p: Sequence[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in p) - 2 * max(p) + 1)


def betas(view: View) -> Values:
    """How the edges stand; None without edge normalisation."""
    nodes = [(name, p) for name, p, _ in _decisions(view.state.arch, "/input")]
    margins = []
    for name, p in nodes:
        pick, ranked = view.state.arch.choices[name].pick, sorted(p, reverse=True)
        if len(ranked) > pick:
            margins.append(ranked[pick - 1] - ranked[pick])
    return {"beta_gini": _mean([gini(p) for _, p in nodes]), "beta_margin": _mean(margins)}


def operations(view: View) -> Values:
    """How often each operation of the space occurs in the genotype, by cell."""
    found: Values = {}
    for cell in CELL_TYPES:
        counts = Counter(op for inputs in getattr(view.genotype, cell).nodes for op, _ in inputs)
        found |= {f"{op}_{cell}": float(counts[op]) for op in view.state.supernet.space.ops if op != "none"}
    return found


def cells(view: View) -> Values:
    """What the cells of the genotype are made of: edges without weights, and pixels that a path sees."""
    found: Values = {}
    genotype = view.genotype.canonical()
    for cell in CELL_TYPES:
        nodes = getattr(genotype, cell).nodes
        free = sum(op in PARAMETER_FREE for inputs in nodes for op, _ in inputs)
        found |= {f"parameter_free_{cell}": float(free), f"receptive_field_{cell}": receptive_field(nodes)}
    return found


PARAMETER_FREE = ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "noise")

EXTENTS = {
    "skip_connect": 1,
    "noise": 0,
    "max_pool_3x3": 3,
    "avg_pool_3x3": 3,
    "max_pool_3x3_bn": 3,
    "sep_conv_3x3": 5,
    "sep_conv_5x5": 9,
    "sep_conv_7x7": 13,
    "dil_conv_3x3": 5,
    "dil_conv_5x5": 9,
    "conv_7x1_1x7": 7,
    "conv_1x3_3x1": 3,
}
"""Side of what one pixel of an operation's output sees of its input at stride 1; the separable convolutions
without dilation are two in a row."""


def receptive_field(nodes: Sequence[Sequence[tuple[str, int]]]) -> float:
    """Sum of the extents of the operations along the longest path of a cell; of equally long the most."""
    longest = {0: (0, 0), 1: (0, 0)}  # edges, and the sum of their extents
    for node, inputs in enumerate(nodes, start=2):
        paths = [
            (longest[source][0] + 1, longest[source][1] + EXTENTS[op])
            for op, source in inputs
            if op != "none" and source in longest
        ]
        if paths:
            longest[node] = max(paths)
    return float(max(longest.values())[1])


def gaps(view: View) -> Values:
    """How much better the supernet is on what its weights learn from than on held-out images."""

    def gap(name: str) -> float | None:
        valid, train = view.metrics[f"valid_{name}"], view.metrics[f"train_{name}"]
        return None if valid is None or train is None else valid - train

    return {"gap_error": gap("error"), "gap_loss": gap("loss")}


def stability(view: View) -> Values:
    """What has changed since the epoch before, in the last epochs and since the first; None without these."""
    names = ("stability_tau", "stability_top", "stability_hamming", "stability_jaccard")
    now, arch = max(view.history, default=-1) + 1, view.state.arch
    present = {name: p for name, p in arch.probabilities().items() if name.endswith("/op")}
    first, before = view.history.get(0), view.history.get(now - 1)
    recent = [view.history.get(now - back) for back in range(1, CHANGED_EPOCHS + 1)]
    found: Values = dict.fromkeys((*names, "stability_changed_5", "alpha_entropy_drop"))
    if before is not None:
        taus, kept = [], []
        for ours, theirs in _pairs(arch, present, before.probabilities):
            kept.append(float(_top(ours) == _top(theirs)))
            taus.append(rank_tau(ours, theirs))
        one, other = view.genotype, before.genotype
        known = [tau for tau in taus if tau is not None]
        values = (_mean(known), _mean(kept), hamming(one, other), jaccard(one, other))
        found |= dict(zip(names, values, strict=True))
    if all(snapshot is not None for snapshot in recent):
        changes = [
            [_top(ours) != _top(theirs) for ours, theirs in _pairs(arch, present, snapshot.probabilities)]
            for snapshot in recent
            if snapshot is not None
        ]
        found["stability_changed_5"] = _mean([float(any(edge)) for edge in zip(*changes, strict=True)])
    if first is not None:
        drops = [
            entropy(theirs) - entropy(ours) for ours, theirs in _pairs(arch, present, first.probabilities)
        ]
        found["alpha_entropy_drop"] = _mean(drops)
    return found


def _pairs(
    arch: Arch, present: dict[str, Tensor], other: dict[str, Tensor]
) -> Iterator[tuple[list[float], list[float]]]:
    """Probabilities of each edge that has something to decide, `present` and `other`."""
    for name, now in present.items():
        rows = zip(now.tolist(), other[name].tolist(), arch.choices[name].allowed, strict=True)
        for new, old, allowed in rows:
            if len(allowed) > 1:
                yield [new[o] for o in allowed], [old[o] for o in allowed]


def _top(p: list[float]) -> int:
    return p.index(max(p))


# --- derivatives in alpha -----------------------------------------------------------------------------------


@contextmanager
def _clean(view: View, learning: Sequence[Tensor] = ()) -> Iterator[Callable[[Batch], Tensor]]:
    """Context with the loss of a batch as a function of the logits, and of the weights `learning`.

    The same draws at every call, with the batch's statistics, nothing dropped, and every activation kept;
    afterwards the supernet is as before.
    """
    supernet = view.state.supernet
    device = supernet.head.weight.device
    noise, checkpoint = supernet.noise, supernet.checkpoint_cells
    modes = [(module, module.training) for module in supernet.modules()]

    def loss(batch: Batch) -> Tensor:
        images, labels = batch
        supernet.noise = type(noise)(generator(view.seed, "noise", "measure", device=device))
        return F.cross_entropy(supernet(images, view.gates()), labels)

    supernet.checkpoint_cells = False
    supernet.train()
    try:
        free = set(map(id, learning))
        with frozen(p for p in supernet.parameters() if id(p) not in free), without_statistics(supernet):
            yield loss
    finally:
        supernet.noise, supernet.checkpoint_cells = noise, checkpoint
        for module, mode in modes:
            module.training = mode


def _alpha(arch: Arch) -> tuple[list[Tensor], Tensor]:
    """Logits of the operations, and which of their entries laid end to end are allowed."""
    names = [name for name in arch.logits if name.endswith("/op")]
    allowed = [
        ~arch.masks[name] if name in arch.masks else torch.ones_like(arch.logits[name], dtype=torch.bool)
        for name in names
    ]
    kept = torch.cat([mask.flatten() for mask in allowed]).nonzero().flatten()
    return [arch.logits[name] for name in names], kept


def hessians(view: View, batches: int) -> Iterator[Hessian]:
    """The Hessian in alpha of the loss of each of some held-out batches, one at a time.

    Of the bare loss, without weight decay, and with the weights as they are: no look-ahead step, whatever the
    order of the architecture update. Alpha are the logits of allowed operations of both cells, not beta.
    """
    logits, kept = _alpha(view.state.arch)
    with _clean(view) as loss:
        for batch in view.batches("held_out", CURVATURE_BATCH, batches):
            yield Hessian(loss(batch), logits, kept)


def largest_eigenvalues(view: View, batches: int) -> list[float]:
    """Largest eigenvalue of each of `hessians`, by Lanczos."""
    # The error of an eigenvalue is of the square of what the tolerance bounds: about 1e-4 of it, measured.
    tolerance = 1e-2
    found = []
    for hessian in hessians(view, batches):
        draws = generator(view.seed, "measure", "lanczos")
        found.append(
            lanczos(hessian.product, hessian.gradient, draws, tolerance=tolerance, largest_only=True)[1]
        )
    return found


def eigenvalue(view: View) -> Values:
    """Dominant eigenvalue of the Hessian in alpha; None where gates are hard."""
    names = ("eigenvalue", "eigenvalue_low", "eigenvalue_high", "eigenvalue_ratio")
    if not view.relaxed:
        return dict.fromkeys(names)
    values = largest_eigenvalues(view, CURVATURE_BATCHES)
    mean, at_first = _mean(values), view.history[0].eigenvalue if 0 in view.history else None
    ratio = mean / at_first if mean is not None and at_first is not None and at_first > 0 else None
    return dict(zip(names, (mean, *interval(values), ratio), strict=True))


HESSIAN_COLUMNS = (
    "hessian",
    "hessian_low",
    "hessian_high",
    "hessian_modulus",
    "hessian_modulus_low",
    "hessian_modulus_high",
    "hessian_trace",
    "hessian_trace_low",
    "hessian_trace_high",
    "hessian_smallest",
    "hessian_asymmetry",
    *(f"hessian_q{round(100 * q):02}" for q in QUANTILES),
)


def hessian(view: View) -> Values:
    """Spectrum of the Hessian in alpha, each number its mean over batches; None where gates are hard."""
    if not view.relaxed:
        return dict.fromkeys(HESSIAN_COLUMNS)
    draws = generator(view.seed, "measure", "hessian")
    found = [spectrum(one, draws) for one in hessians(view, CURVATURE_BATCHES)]
    largest, trace = [one.largest for one in found], [one.trace for one in found]
    modulus = [abs(one.dominant) for one in found]  # signs may differ: what is meant is how curved it is
    inner = [one.quantiles for one in found if one.quantiles is not None]
    values = (
        *(number for each in (largest, modulus, trace) for number in (_mean(each), *interval(each))),
        _mean([one.smallest for one in found]),
        _mean([one.asymmetry for one in found if one.asymmetry is not None]),
        *(_mean([one[i] for one in inner]) for i in range(len(QUANTILES))),
    )
    return dict(zip(HESSIAN_COLUMNS, values, strict=True))


def alignment(view: View) -> Values:
    """How the gradients in alpha of held-out and of weight images point; None where gates are hard."""
    names = ("alignment", "alignment_norm", "alignment_max")
    if not view.relaxed:
        return dict.fromkeys(names)
    logits, kept = _alpha(view.state.arch)
    slopes = {}
    with _clean(view) as loss:
        for part in ("held_out", "weights"):
            total = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
            count = 0
            for batch in view.batches(part, CURVATURE_BATCH, CURVATURE_BATCHES):
                found = torch.autograd.grad(loss(batch), logits, allow_unused=True, materialize_grads=True)
                total += torch.cat([slope.flatten() for slope in found])[kept]
                count += 1
            slopes[part] = total / max(count, 1)
    held_out, weights = slopes["held_out"], slopes["weights"]
    norms = float(held_out.norm() * weights.norm())
    cosine = float(held_out @ weights) / norms if norms else None
    return dict(zip(names, (cosine, float(held_out.norm()), float(held_out.abs().max())), strict=True))


# --- derivatives in the weights -----------------------------------------------------------------------------


def gradients(view: View) -> Values:
    """Norm of the gradient in the weights of each operation over the root of their number.

    Of the loss of weight images; where gates are hard, under one draw of them. None of an operation that has
    no weights in this supernet, as a skip that never strides.
    """
    supernet = view.state.supernet
    found: Values = dict.fromkeys(f"gradient_{op}" for op in WEIGHTED_OPS if op in supernet.space.ops)
    weights = {name: p for name, p in supernet.named_parameters() if ".weighted." in name}
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
    count = 0
    with _clean(view, list(weights.values())) as loss:
        for batch in view.batches("weights", CURVATURE_BATCH, CURVATURE_BATCHES):
            slopes = torch.autograd.grad(
                loss(batch), list(weights.values()), allow_unused=True, materialize_grads=True
            )
            for name, slope in zip(weights, slopes, strict=True):
                totals[name] += slope
            count += 1
    for op in WEIGHTED_OPS:
        own = [total.flatten() for name, total in totals.items() if f".weighted.{op}." in name]
        if own and count:
            found[f"gradient_{op}"] = float(torch.cat(own).square().mean().sqrt()) / count
    return found


WEIGHTED_OPS = ("skip_connect", *CONV_OPS)


# --- perturbation -------------------------------------------------------------------------------------------


def perturbation(view: View) -> Values:
    """What taking one operation away costs the supernet; None where gates are hard.

    An operation's weight on one edge is set to 0 and the others stay as they are. The one whose absence hurts
    most is what DARTS-PT would choose, without the tuning in between. Of equals in error, the loss decides.
    """
    names = ("perturbation", "perturbation_agreement")
    if not view.relaxed:
        return dict.fromkeys(names)
    gates, state = detached(view.gates()), view.state
    likely = state.arch.probabilities()  # gates are of one draw
    most = PERTURBATION_IMAGES // PERTURBATION_BATCH
    batches = list(view.batches("held_out", PERTURBATION_BATCH, most))
    _, whole = supernet_quality(state, gates, batches)
    drops, agreed = [], []
    for name, gate in gates.items():
        table = state.arch.choices[name]
        if not name.endswith("/op"):
            continue
        for row, allowed in enumerate(table.allowed):
            options = [option for option in allowed if table.options[option] != "none"]
            if len(options) < 2:
                continue
            hurt = {}
            for option in options:
                weights = gate.weights.clone()
                weights[row, option] = 0
                without = {**gates, name: Gate(weights, gate.active)}
                loss, error = supernet_quality(state, without, batches)
                hurt[option] = (error, loss)
            chosen = max(options, key=lambda option: hurt[option])
            drops.append(hurt[chosen][0] - whole)
            p = likely[name][row].tolist()
            agreed.append(float(chosen == max(options, key=lambda option: p[option])))
    return dict(zip(names, (_mean(drops), _mean(agreed)), strict=True))


# --- the tables ---------------------------------------------------------------------------------------------

_CURVATURE = (
    f"Hessian of the held-out loss in alpha, mean over {CURVATURE_BATCHES} batches of {CURVATURE_BATCH} "
    "images with the batch's statistics, without weight decay"
)
_INTERVAL = "end of the 95 % interval of that mean over batches (Student's t)"

MEASURES: dict[str, Measure] = {
    "alphas": Measure(
        {
            "alpha_entropy_normal": Metric("fraction", "neither", "normalised entropy, normal cell"),
            "alpha_entropy_reduce": Metric("fraction", "neither", "normalised entropy, reduction cell"),
            "alpha_entropy_max": Metric(
                "fraction", "neither", "normalised entropy of the least decided edge"
            ),
            "alpha_entropy_ops": Metric("fraction", "neither", "normalised entropy with none left out"),
            "none_mass": Metric("fraction", "neither", "mean probability of none"),
            "one_hot_distance": Metric(
                "1", "lower", "mean distance of an edge's probabilities from its likeliest option alone"
            ),
        },
        alphas,
    ),
    "betas": Measure(
        {
            "beta_gini": Metric(
                "fraction", "neither", "Gini coefficient of a node's inputs, 1 if one has all"
            ),
            "beta_margin": Metric("fraction", "neither", "gap between the last input kept and the next one"),
        },
        betas,
    ),
    "operations": Measure(
        {
            f"{op}_{cell}": Metric("count", "neither", f"{op} in the {cell} cell")
            for cell in CELL_TYPES
            for op in OPERATIONS
            if op != "none"
        },
        operations,
    ),
    "cells": Measure(
        {
            **{
                f"parameter_free_{cell}": Metric(
                    "count", "neither", f"skips, pools and noise in the {cell} cell; a skip may stride"
                )
                for cell in CELL_TYPES
            },
            **{
                f"receptive_field_{cell}": Metric(
                    "pixels",
                    "neither",
                    f"sum of the extents of operations along the longest path, {cell} cell",
                )
                for cell in CELL_TYPES
            },
        },
        cells,
    ),
    "gaps": Measure(
        {
            "gap_error": Metric("fraction", "lower", "held-out error minus training error of the supernet"),
            "gap_loss": Metric("nats", "lower", "held-out loss minus training loss of the supernet"),
        },
        gaps,
    ),
    "stability": Measure(
        {
            "stability_tau": Metric(
                "1", "higher", "mean over edges of Kendall's tau-b of operations with the epoch before"
            ),
            "stability_top": Metric(
                "fraction", "higher", "edges whose likeliest operation is that of the epoch before"
            ),
            "stability_hamming": Metric(
                "fraction", "lower", "edges of the genotype new since the epoch before"
            ),
            "stability_jaccard": Metric("fraction", "higher", "edges shared with the epoch before, over all"),
            "stability_changed_5": Metric(
                "fraction", "lower", "edges whose likeliest operation changed in the last 5 epochs"
            ),
            "alpha_entropy_drop": Metric(
                "fraction", "neither", "normalised entropy of operations at the stage's first epoch minus now"
            ),
        },
        stability,
    ),
    "alignment": Measure(
        {
            "alignment": Metric(
                "1", "higher", "cosine of the gradients in alpha of held-out and weight images"
            ),
            "alignment_norm": Metric("nats", "neither", "norm of the gradient in alpha of held-out images"),
            "alignment_max": Metric("nats", "neither", "largest entry of it in modulus"),
        },
        alignment,
        when="every",
    ),
    "eigenvalue": Measure(
        {
            "eigenvalue": Metric("nats", "lower", f"largest eigenvalue of the {_CURVATURE}; by Lanczos"),
            "eigenvalue_low": Metric("nats", "neither", f"lower {_INTERVAL}"),
            "eigenvalue_high": Metric("nats", "neither", f"upper {_INTERVAL}"),
            "eigenvalue_ratio": Metric(
                "1", "lower", "that eigenvalue over what it was after the stage's first epoch, if above 0"
            ),
        },
        eigenvalue,
        when="every",
    ),
    "hessian": Measure(
        {
            "hessian": Metric("nats", "lower", f"largest eigenvalue of the {_CURVATURE}"),
            "hessian_low": Metric("nats", "neither", f"lower {_INTERVAL}"),
            "hessian_high": Metric("nats", "neither", f"upper {_INTERVAL}"),
            "hessian_modulus": Metric("nats", "lower", "modulus of its eigenvalue of largest modulus"),
            "hessian_modulus_low": Metric("nats", "neither", f"lower {_INTERVAL}"),
            "hessian_modulus_high": Metric("nats", "neither", f"upper {_INTERVAL}"),
            "hessian_trace": Metric("nats", "neither", "its trace"),
            "hessian_trace_low": Metric("nats", "neither", f"lower {_INTERVAL}"),
            "hessian_trace_high": Metric("nats", "neither", f"upper {_INTERVAL}"),
            "hessian_smallest": Metric("nats", "neither", "its smallest eigenvalue"),
            "hessian_asymmetry": Metric("1", "lower", "part of it that rounding makes asymmetric"),
            **{
                f"hessian_q{round(100 * q):02}": Metric(
                    "nats", "neither", f"quantile {q:g} of its eigenvalues"
                )
                for q in QUANTILES
            },
        },
        hessian,
        when="last",
    ),
    "gradients": Measure(
        {
            f"gradient_{op}": Metric(
                "nats",
                "neither",
                f"norm of the gradient in the weights of {op} over the root of their number, of the loss on "
                f"{CURVATURE_BATCHES} batches of {CURVATURE_BATCH} weight images",
            )
            for op in WEIGHTED_OPS
        },
        gradients,
        when="every",
    ),
    "perturbation": Measure(
        {
            "perturbation": Metric(
                "fraction",
                "neither",
                "mean over edges of the rise in held-out error without the operation that is missed most, "
                f"on up to {PERTURBATION_IMAGES} images",
            ),
            "perturbation_agreement": Metric(
                "fraction", "higher", "edges where that operation is the likeliest one"
            ),
        },
        perturbation,
        when="last",
    ),
}
"""What `Trial.measure` may name, besides proxies and groups."""

GROUPS: dict[str, tuple[str, ...]] = {
    "descriptors": ("alphas", "betas", "operations", "cells", "gaps", "stability"),
    "proxies": tuple(PROXIES),
}
"""Names that stand for several."""


def check_measures(names: Sequence[str]) -> None:
    """Refuse names of nothing.

    Raises:
        ValueError: a name is unknown.
    """
    known = (*GROUPS, *MEASURES, *PROXIES)
    for name in names:
        if name not in known:
            raise ValueError(f"measure: {name!r} is not one of {', '.join(known)}")


def spelled_out(names: Sequence[str]) -> tuple[str, ...]:
    """`names` with groups replaced by what they stand for, each once, in the order of the tables."""
    asked = {member for name in names for member in GROUPS.get(name, (name,))}
    return tuple(name for name in (*MEASURES, *PROXIES) if name in asked)


def measured(names: Sequence[str], view: View, *, every: bool, last: bool) -> Values:
    """Columns of those of `names` that are due after this epoch, and the seconds of each.

    `every` says whether those that run the supernet are due; after the `last` epoch of a stage all are.
    """
    due = {"always", *(["every"] if every else []), *(["every", "last"] if last else [])}
    found: Values = {}
    for name in spelled_out(names):
        measure = MEASURES.get(name)
        if measure is not None and measure.when in due:
            started = time.perf_counter()
            try:
                values, status = _known(measure.compute(view))
            except torch.OutOfMemoryError as error:  # one measure less is no reason to lose the trial
                _logger.warning("measure %s ran out of memory: %s", name, " ".join(str(error).split())[:200])
                values, status = dict.fromkeys(measure.columns), "error"
            found |= values
            found[f"{name}_seconds"] = time.perf_counter() - started
            if measure.runs:
                found[f"{name}_status"] = float(STATUSES.index(status))
    return found


def _known(values: Values) -> tuple[Values, str]:
    """`values`, none of which stands where one is not finite, and what became of them."""
    numbers = [value for value in values.values() if value is not None]
    if all(map(math.isfinite, numbers)):
        return values, "ok"
    return dict.fromkeys(values), "nan" if any(map(math.isnan, numbers)) else "inf"


def columns_of(names: Sequence[str]) -> tuple[str, ...]:
    """Columns that `measured` may give for `names`."""
    chosen = [name for name in spelled_out(names) if name in MEASURES]
    return tuple(column for name in chosen for column in _columns(name))


def _columns(name: str) -> dict[str, Metric]:
    """All that a measure gives."""
    measure = MEASURES[name]
    told = {**measure.columns, f"{name}_seconds": Metric("s", "lower", f"wall time of measuring {name}")}
    if measure.runs:
        told[f"{name}_status"] = Metric("code", "lower", _CODES)
    return told


_CODES = ", ".join(f"{number} {status}" for number, status in enumerate(STATUSES))


def proxy_columns(names: Sequence[str]) -> dict[str, Metric | Proxy]:
    """Columns of the proxies among `names`, and of the baselines that come with any."""
    chosen, told = set(spelled_out(names)) & set(PROXIES), dict[str, Metric | Proxy]()
    for name, proxy in PROXIES.items():
        if name in chosen or (chosen and name in BASELINES):
            told[f"proxy_{name}"] = proxy
            told[f"proxy_{name}_sd"] = Metric(proxy.unit, "neither", "its deviation over runs")
            told[f"proxy_{name}_seconds"] = Metric("s", "lower", f"wall time of measuring {name}")
            told[f"proxy_{name}_status"] = Metric("code", "lower", _CODES)
    return told


STOP_COLUMNS: dict[str, Metric] = {
    "stop_eigenvalue": Metric("nats", "lower", "largest eigenvalue that the method's stop looks at"),
    "stop_epoch": Metric("epochs", "neither", "epoch of the stage after which the stop ended it"),
    "stop_back_to": Metric("epochs", "neither", "epoch of the stage whose architecture was taken instead"),
    "stop_seconds": Metric("s", "lower", "wall time of that eigenvalue; part of the epoch's seconds"),
}
"""What a search whose method may stop early records besides."""


def seconds_of(values: Values) -> float:
    """Seconds that the measures of an epoch took."""
    return math.fsum(values.get(f"{name}_seconds") or 0.0 for name in MEASURES)


def catalogue(names: Sequence[str], *, stops: bool = False) -> dict[str, dict[str, str]]:
    """Unit, direction and meaning of what is recorded of a trial when `names` are measured, by column.

    Columns are those of an epoch's row, of which a trial's result repeats some as `search_<column>`, and
    those of the result alone. `stops`: whether the method may stop early. For study.json, so that a reader of
    records needs no code to know them.
    """
    told: dict[str, Metric | Proxy] = {**METRICS, **(STOP_COLUMNS if stops else {})}
    for name in spelled_out(names):
        if name in MEASURES:
            told |= _columns(name)
    told |= proxy_columns(names) | FINAL
    return {
        column: {"unit": one.unit, "better": one.better, "meaning": one.meaning}
        for column, one in told.items()
    }
