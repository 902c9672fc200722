"""Zero-cost proxies: scores of an untrained network that need a batch or two, and the baselines to beat.

Larger is predicted better in all of them, whatever sign a paper or its code has. W are the weights of
convolutions and linear layers, L the mean cross-entropy of one batch of N images, with the batch's statistics
in batch norm, without drop-path and auxiliary head. Nothing of the network changes: it runs with copies of
what a pass would write to.

Sources: grad_norm, snip, grasp, synflow, fisher, jacob_cov as compared by Abdelfattah et al.,
arXiv:2101.08134; naswot Mellor et al., arXiv:2006.04647; zen Lin et al., arXiv:2102.01063; epe_nas Lopes et
al., arXiv:2102.08099.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from nas.ops import Noise
from nas.state import Batch
from nas.streams import generator

Runs = Literal["batches", "inits", "once"]

STATUSES = ("ok", "nan", "inf", "error")
"""What became of a proxy; its status column holds the place in this list."""

EPSILON = 1e-5
"""k of jacob_cov and epe_nas."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proxy:
    """A score of a network before training."""

    unit: str
    better: Literal["lower", "higher", "neither"]
    meaning: str
    score: "Callable[[Subject, Batch], float]"
    runs: Runs = "batches"
    """Over what it is averaged: every initialisation and batch, every initialisation, or nothing."""


class Subject:
    """A network as proxies see it: it runs with given weights, and keeps none of what a run does."""

    def __init__(self, network: nn.Module, seed: int = 0) -> None:
        self.network, self.seed = network, seed
        layers = [
            f"{name}.weight" if name else "weight"
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        parameters = {
            name: value.detach()
            for name, value in network.named_parameters()
            if not name.startswith("auxiliary.")
        }
        self.weights = {
            name: parameters[name].clone().requires_grad_() for name in layers if name in parameters
        }
        """Of convolutions and linear layers, without the auxiliary head."""
        self.others = {name: value for name, value in parameters.items() if name not in self.weights}

    def logits(self, images: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, classes) in training mode, with `tensors` in place of parameters."""
        held = {**self.weights, **self.others, **(tensors or {})}
        like = next(iter(held.values()))
        buffers = {
            name: buffer.to(like.dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
            for name, buffer in self.network.named_buffers()
            if not name.startswith("auxiliary.")
        }
        with _at_rest(self.network, self.seed):
            out = functional_call(self.network, {**held, **buffers}, (images,))
        logits: Tensor = out[0] if isinstance(out, tuple) else out
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.logits(images), labels)

    def slopes(self, batch: Batch) -> list[Tensor]:
        """Gradient of the loss in every weight."""
        return _gradients(self.loss(batch), list(self.weights.values()))


@contextmanager
def _at_rest(network: nn.Module, seed: int) -> Iterator[None]:
    """Context in which `network` runs in training mode, but drops nothing and draws from a stream."""
    changed: list[tuple[nn.Module, str, Any]] = []

    def put(module: nn.Module, name: str, value: Any) -> None:
        if hasattr(module, name):
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    device = next(network.parameters()).device
    put(network, "drop_path", 0.0)
    put(network, "auxiliary", None)
    put(network, "checkpoint_cells", False)
    for module in network.modules():
        put(module, "training", not isinstance(module, nn.modules.dropout._DropoutNd))
        if isinstance(module, Noise):
            put(module, "generator", generator(seed, "proxy", "noise", device=device))
    try:
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)


def _gradients(value: Tensor, inputs: Sequence[Tensor], *, graph: bool = False) -> list[Tensor]:
    return list(
        torch.autograd.grad(value, inputs, create_graph=graph, allow_unused=True, materialize_grads=True)
    )


def _total(terms: Iterable[Tensor]) -> float:
    return math.fsum(float(term.double().sum()) for term in terms)


# --- gradients of the loss ----------------------------------------------------------------------------------


def grad_norm(subject: Subject, batch: Batch) -> float:
    """Sum over layers of the norm of dL/dW."""
    return _total(slope.norm() for slope in subject.slopes(batch))


def plain(subject: Subject, batch: Batch) -> float:
    """Sum of W * dL/dW."""
    slopes = subject.slopes(batch)
    return _total(w.detach() * g for w, g in zip(subject.weights.values(), slopes, strict=True))


def snip(subject: Subject, batch: Batch) -> float:
    """Sum of |W * dL/dW|."""
    slopes = subject.slopes(batch)
    return _total((w.detach() * g).abs() for w, g in zip(subject.weights.values(), slopes, strict=True))


def grasp(subject: Subject, batch: Batch) -> float:
    """Minus the sum of W * (H g), with g = dL/dW and H the Hessian of L in W."""
    return grasp_of(subject.loss(batch), list(subject.weights.values()))


def grasp_of(loss: Tensor, weights: Sequence[Tensor]) -> float:
    """Grasp of any scalar in any tensors."""
    slopes = _gradients(loss, weights, graph=True)
    inner = torch.stack([(g.detach() * g).sum() for g in slopes]).sum()
    return -_total(w.detach() * hg for w, hg in zip(weights, _gradients(inner, weights), strict=True))


def fisher(subject: Subject, batch: Batch) -> float:
    """Sum over layers and channels of half the mean over n of (sum over pixels of a * dL/da) squared.

    a (N, C, ...) is what a convolution or linear layer puts out, before batch norm and ReLU. No channel is
    multiplied by the number of its weights, as some code does.
    """
    outputs: list[Tensor] = []
    with _outputs(subject.network, lambda module, out: outputs.append(out)):
        loss = subject.loss(batch)
    products = [a.detach() * g for a, g in zip(outputs, _gradients(loss, outputs), strict=True)]
    sums = [p.double().flatten(2).sum(dim=2) if p.dim() > 2 else p.double() for p in products]
    return _total(0.5 * s.square().mean(dim=0) for s in sums)


@contextmanager
def _outputs(network: nn.Module, take: Callable[[nn.Module, Tensor], object]) -> Iterator[None]:
    """Context in which `take` gets the output of every convolution and linear layer that runs."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        take(module, output)

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


# --- without the loss ---------------------------------------------------------------------------------------


class _Intercept(TorchFunctionMode):
    """Calls of some functions of PyTorch go to `instead(function, args, kwargs)`."""

    def __init__(self, functions: Iterable[Any], instead: Callable[..., Any]) -> None:
        super().__init__()
        self.functions, self.instead = frozenset(functions), instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions:
            return self.instead(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def synflow(subject: Subject, batch: Batch) -> float:
    """Logarithm of the sum of W * dR/dW, with R the sum of what the network makes of an image of ones.

    In double precision, with |W| for W and batch norm left out.
    """
    return _log(synflow_of(subject, batch[0][:1]))


def _log(value: float) -> float:
    """Logarithm; -inf of what is not positive, and nan of nan."""
    return math.log(value) if value > 0 else math.nan if math.isnan(value) else -math.inf


def synflow_of(subject: Subject, image: Tensor) -> float:
    """Synflow itself, which may span hundreds of orders of magnitude; `image` (1, ...) gives the shape."""
    held = {name: w.detach().double().abs() for name, w in (subject.weights | subject.others).items()}
    weights = [held[name].requires_grad_() for name in subject.weights]
    ones = torch.ones_like(image, dtype=torch.float64)
    with _Intercept([F.batch_norm], lambda function, args, kwargs: args[0] if args else kwargs["input"]):
        flow = subject.logits(ones, held).sum()
    return _total(w.detach() * g for w, g in zip(weights, _gradients(flow, weights), strict=True))


def jacobian(subject: Subject, batch: Batch) -> Tensor:
    """Gradient of the sum of each image's own logits in that image, (N, C*H*W), in double precision.

    The batch's statistics count as constants. Through them all logits depend on all images, and their total,
    where a network ends in batch norm as most of these do, on none: its gradient would be rounding.
    """
    images = batch[0].detach().clone().requires_grad_()

    def normalise(function: Any, args: Any, kwargs: Any) -> Any:
        given = signature(F.batch_norm).bind(*args, **kwargs).arguments
        x = given["input"]
        variance, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), unbiased=False)
        scale, shift = given.get("weight"), given.get("bias")
        return F.batch_norm(x, mean, variance, scale, shift, training=False, eps=given.get("eps", 1e-5))

    with _Intercept([F.batch_norm], normalise):
        total = subject.logits(images).sum()
    return _gradients(total, [images])[0].flatten(1).double()


def jacob_cov(subject: Subject, batch: Batch) -> float:
    """Minus the sum over eigenvalues v of the images' correlations of log(v + k) + 1 / (v + k).

    Of half as many images as an image has values, at most: correlations of as many rows as columns, or more,
    have an eigenvalue of 0 whatever the network, and its term 1 / k is all that is left of the score.
    """
    images, labels = batch
    most = max(2, images[0].numel() // 2)
    return jacob_cov_of(jacobian(subject, (images[:most], labels[:most])))


def jacob_cov_of(rows: Tensor) -> float:
    """Of Jacobian rows (N, pixels); nan where a row is constant."""
    correlations = _correlations(rows)
    if not bool(correlations.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(correlations) + EPSILON
    return -float((values.log() + 1 / values).sum())


def _correlations(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(dim=1, keepdim=True)
    unit: Tensor = centred / centred.norm(dim=1, keepdim=True)
    return unit @ unit.T


def epe_nas(subject: Subject, batch: Batch) -> float:
    """How much the correlations of the images of a class say, over classes with two images or more."""
    return epe_nas_of(jacobian(subject, batch), batch[1])


def epe_nas_of(rows: Tensor, labels: Tensor) -> float:
    """Of Jacobian rows (N, pixels) and labels (N,).

    With s_c the sum of log(|correlation| + k) over the pairs of class c: the sum of |s_c| up to 100 classes,
    the mean of |s_c - s_d| above.
    """
    groups = [rows[labels == label] for label in sorted(set(labels.tolist()))]
    sums = [float((_correlations(group).abs() + EPSILON).log().sum()) for group in groups if len(group) > 1]
    if not sums or not all(map(math.isfinite, sums)):
        return math.nan
    if len(sums) <= 100:
        return math.fsum(map(abs, sums))
    pairs = [abs(one - other) for i, one in enumerate(sums) for other in sums[:i]]
    return math.fsum(pairs) / len(pairs)


def naswot(subject: Subject, batch: Batch) -> float:
    """Logarithm of |det K|, with K_ij the number of ReLUs that are on or off for both images i and j.

    The network rectifies a tensor once however many operations read it, and so it counts once.
    """
    kernels: list[Tensor] = []

    def watch(function: Any, args: Any, kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        kernels.append(alike((out > 0).flatten(1)))
        return out

    with torch.no_grad(), _Intercept(RELUS, watch):
        subject.logits(batch[0])
    return naswot_of(kernels)


def alike(codes: Tensor) -> Tensor:
    """On or off (N, units) -> for how many units two images have the same (N, N)."""
    on, off = codes.float(), (~codes).float()
    return (on @ on.T + off @ off.T).double()


def naswot_of(kernels: Sequence[Tensor]) -> float:
    """Of the kernels (N, N) of every ReLU; -inf where two images have one code."""
    if not kernels:
        return math.nan
    kernel = torch.stack(list(kernels)).sum(dim=0)
    units = kernel.diagonal().max()
    others = kernel - torch.diag(kernel.diagonal())
    if bool((others == units).any()):
        return -math.inf  # two equal rows: rounding would make some large negative number of it
    return float(torch.linalg.slogdet(kernel).logabsdet)


ZEN_REPEATS = 8
ZEN_STEP = 0.01


def zen(subject: Subject, batch: Batch) -> float:
    """How much the features before pooling change with the image, under Gaussian weights.

    Mean over repeats of log(mean over n of |f(x) - f(x + 0.01 e)|_1) + the sum over batch norms of the log of
    the root of the mean variance by which they divide; x and e as many and as large as the batch, N(0, 1).
    """
    return math.fsum(_zen(subject, batch[0], repeat) for repeat in range(ZEN_REPEATS)) / ZEN_REPEATS


def _zen(subject: Subject, like: Tensor, repeat: int) -> float:
    device = like.device
    draws = generator(subject.seed, "proxy", "zen", repeat, device=device)
    held = {name: torch.randn(w.shape, generator=draws, device=device) for name, w in subject.weights.items()}
    held |= {name: torch.zeros_like(value) for name, value in subject.others.items()}
    images, noise = (torch.randn(like.shape, generator=draws, device=device) for _ in range(2))
    variances: list[Tensor] = []
    features: list[Tensor] = []

    def watch(function: Any, args: Any, kwargs: Any) -> Any:
        if function is F.adaptive_avg_pool2d:
            features.append(args[0])
            return function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        variances.append(x.double().var(dim=(0, 2, 3), unbiased=False).mean())
        return F.batch_norm(x, None, None, training=True)

    with torch.no_grad(), _Intercept([F.batch_norm, F.adaptive_avg_pool2d], watch):
        out = subject.logits(images, held)
        clean, norms = features[-1] if features else out, list(variances)
        features.clear()
        out = subject.logits(images + ZEN_STEP * noise, held)
        moved = features[-1] if features else out
    change = float((clean - moved).double().abs().flatten(1).sum(dim=1).mean())
    return _log(change) + math.fsum(0.5 * _log(float(norm)) for norm in norms)


# --- baselines ----------------------------------------------------------------------------------------------


def l2_norm(subject: Subject, batch: Batch) -> float:
    """Sum over layers of the norm of W."""
    return _total(w.detach().norm() for w in subject.weights.values())


def params(subject: Subject, batch: Batch) -> float:
    """Number of weights of any kind."""
    return float(sum(value.numel() for value in (subject.weights | subject.others).values()))


def madds(subject: Subject, batch: Batch) -> float:
    """Multiply-adds of convolutions and linear layers for one image."""
    counts: list[int] = []

    def count(module: nn.Module, out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counts.append(out[0].numel() * weight[0].numel())

    with torch.no_grad(), _outputs(subject.network, count):
        subject.logits(batch[0][:2])
    return float(sum(counts))


PROXIES: dict[str, Proxy] = {
    "l2_norm": Proxy("1", "higher", "sum over layers of |W|", l2_norm, "inits"),
    "params": Proxy("count", "higher", "weights of the derived network", params, "once"),
    "madds": Proxy("count", "higher", "multiply-adds of the derived network for an image", madds, "once"),
    "grad_norm": Proxy("nats", "higher", "sum over layers of |dL/dW|", grad_norm),
    "plain": Proxy("nats", "higher", "sum of W dL/dW", plain),
    "snip": Proxy("nats", "higher", "sum of |W dL/dW|", snip),
    "grasp": Proxy("nats^2", "higher", "minus the sum of W (H dL/dW)", grasp),
    "fisher": Proxy(
        "nats^2",
        "higher",
        "sum of half the squared saliency of channels that convolutions and linear layers put out, "
        "not times the number of their weights",
        fisher,
    ),
    "synflow": Proxy("log", "higher", "logarithm of the sum of W dR/dW with |W|", synflow, "inits"),
    "jacob_cov": Proxy(
        "1",
        "higher",
        "how uncorrelated the Jacobians of images are, at most half as many as an image has values",
        jacob_cov,
    ),
    "naswot": Proxy(
        "log",
        "higher",
        "log-determinant of the kernel of ReLU codes; what several operations read is rectified, and counts, "
        "once",
        naswot,
    ),
    "zen": Proxy("log", "higher", "sensitivity of features under Gaussian weights", zen, "once"),
    "epe_nas": Proxy("1", "higher", "correlation of the Jacobians within classes", epe_nas),
}
"""All proxies by name, the baselines first."""

BASELINES = ("l2_norm", "params", "madds")
"""Measured with any other: no claim of a proxy stands without them."""

INITS, BATCHES, BATCH_SIZE = 3, 3, 64
"""Initialisations and batches over which a proxy is averaged, and images of a batch."""


def evaluate(
    names: Iterable[str], build: Callable[[int], nn.Module], batches: Sequence[Batch], seed: int
) -> dict[str, float | None]:
    """Columns of the proxies `names` and of the baselines: value, deviation over runs, seconds and status.

    `build(i)` gives the network at its i-th initialisation. A value that is not finite is None, and its
    status says why.
    """
    found: dict[str, float | None] = {}
    chosen = set(names)
    for name in (name for name in PROXIES if name in chosen or (chosen and name in BASELINES)):
        started = time.perf_counter()
        value, deviation, status = _score(name, build, batches, seed)
        found[f"proxy_{name}"] = value
        found[f"proxy_{name}_sd"] = deviation
        found[f"proxy_{name}_seconds"] = time.perf_counter() - started
        found[f"proxy_{name}_status"] = float(STATUSES.index(status))
    return found


def _score(
    name: str, build: Callable[[int], nn.Module], batches: Sequence[Batch], seed: int
) -> tuple[float | None, float | None, str]:
    """A proxy's mean over runs, its deviation over them if they are several, and what became of it."""
    proxy = PROXIES[name]
    used = batches if proxy.runs == "batches" else batches[:1]
    values: list[float] = []
    try:
        if not used:
            raise ValueError("no batch of two images or more to score the network by")
        for init in range(1 if proxy.runs == "once" else INITS):
            subject = Subject(build(init), seed)
            values += [proxy.score(subject, batch) for batch in used]
        if any(map(math.isnan, values)):
            return None, None, "nan"
        if any(map(math.isinf, values)):
            return None, None, "inf"
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, "ok"
    # One proxy less is no reason to lose the trial. A sum may overflow though none of its terms does.
    except (RuntimeError, ValueError, ArithmeticError) as error:
        _logger.warning("proxy %s failed: %s", name, " ".join(str(error).split())[:200])
        return None, None, "error"
