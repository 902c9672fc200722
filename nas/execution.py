"""How cells run: compiled, or with activations computed again instead of kept. What they compute stays."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Compile = Literal["off", "default", "reduce-overhead"]
"""Mode of `torch.compile`; "reduce-overhead" replays CUDA graphs, and its results are overwritten by the next
step."""

SHAPES = 64
"""Forms of a cell that may be compiled: by width, map, kinds of its inputs, with and without drop-path."""


def compile_cells(cells: Iterable[nn.Module], setting: Compile) -> None:
    """Compile each cell in place at its first call; cells alike in shape share their code.

    Neither the tree of modules nor its state dict changes.
    """
    if setting == "off":
        return
    for cell in cells:
        cell.compile(mode=setting, dynamic=False, recompile_limit=SHAPES)


def set_deterministic(on: bool) -> None:
    """Let GPUs use only algorithms that give the same bits every time, or any; CPUs need no telling.

    For the whole process, and to be called before it uses a GPU. An operation that has no such algorithm
    raises a RuntimeError that names it.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # mypy misses it


def uncompiled(setting: Compile) -> AbstractContextManager[object]:
    """Context in which compiled modules run as written: for evaluation and odd batches, of other shapes."""
    return nullcontext() if setting == "off" else torch.compiler.set_stance("force_eager")


def recomputed(module: nn.Module, *inputs: Any, generator: torch.Generator | None) -> Any:
    """`module(*inputs)`, of which only the inputs are kept; the backward pass computes the rest again.

    Exactly so: the second pass repeats the draws of the first from `generator`, which it leaves as it finds
    it, and does not count its batch in running statistics again.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)
    replay = _Replay(module, generator)
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing draws from the global generators
        context_fn=lambda: (nullcontext(), replay),
    )


class _Replay:
    """Context of a second pass through `module`; entered as often as there are backward passes."""

    def __init__(self, module: nn.Module, generator: torch.Generator | None) -> None:
        self.module, self.generator = module, generator
        self.state = None if generator is None else generator.get_state()
        self.exits = ExitStack()

    def __enter__(self) -> None:
        # Copies take what the pass adds to the statistics. A pass without any would save other tensors than
        # the first one, which PyTorch refuses.
        for part in self.module.modules():
            if getattr(part, "track_running_stats", False):
                self.exits.callback(part._buffers.update, dict(part._buffers))
                part._buffers.update({name: _copy(buffer) for name, buffer in part._buffers.items()})
        if self.generator is not None and self.state is not None:
            self.exits.callback(self.generator.set_state, self.generator.get_state())
            self.generator.set_state(self.state)

    def __exit__(self, *error: object) -> None:
        self.exits.close()


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()
