"""What to bench: kernels of the registry at the shapes that real models' decode plans ask for.

So a record lines up with the published row of the same shape on the same GPU. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..kernels.formats import FORMATS
from ..kernels.registry import KERNELS, Kernel, find_kernels
from .decode_plan import decode_plan
from .deployment import PRECISIONS, Deployment
from .gpus import Gpu
from .models import load_model
from .ops import Gemm, Op
from .peers import COPY, COPY_SHAPES, PEERS

DEFAULT_MODELS = ("deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b")
DEFAULT_BATCHES = (1, 16, 64, 128, 512, 4096)

_QUANTIZED = PRECISIONS["fp8"]
"""Shapes do not depend on the precision; this one tells what a quantized checkpoint quantizes from what it does not."""


@dataclass(frozen=True)
class Target:
    """One kernel at one shape. ``places``: where in which model the shape stands ("deepseek-v3 o_proj")."""

    kernel: Kernel
    fields: tuple[tuple[str, int], ...]
    places: tuple[str, ...]

    @property
    def shape(self) -> dict[str, int]:
        return dict(self.fields)

    @property
    def l2_policy(self) -> str:
        """Decoding finds its weights out of L2; a kernel without weights is measured with everything out of it."""
        return "cold_weights" if self.kernel.work(self.shape).weight_bytes else "cold_all"


_Add = Callable[[Kernel, tuple[tuple[str, int], ...], str], None]


def capability(gpu: Gpu) -> int:
    """Ten times the compute capability of an NVIDIA GPU.

    Raises:
        ValueError: not an NVIDIA GPU.
    """
    major, _, minor = gpu.compute_capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ValueError(f"gpu: expected an NVIDIA GPU; got {gpu.name} ({gpu.compute_capability})")
    return 10 * int(major) + int(minor)


def find_targets(
    op: str | None, formats: Sequence[str] | None, models: Iterable[str], batches: Iterable[int], gpu: Gpu
) -> list[Target]:
    """The kernels that run on ``gpu``, and the libraries' beside them, at the shapes of ``models``.

    Args:
        op: "gemm", "copy", or None for all. formats: as in ``find_kernels``; None: for each model those of its
            checkpoint, or all where no kernel has these.
        batches: tokens per GPU and step.

    Raises:
        ValueError: unknown op, format or model; nothing that runs on this GPU.
    """
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Target] = {}

    def add(kernel: Kernel, fields: tuple[tuple[str, int], ...], place: str) -> None:
        key = (kernel.name, fields)
        places = found[key].places if key in found else ()
        found[key] = Target(kernel, fields, tuple(dict.fromkeys((*places, place))))

    if op in (None, COPY.op):
        for shape in COPY_SHAPES:
            add(COPY, tuple(shape.items()), "memory")
    if op != COPY.op:
        limit = capability(gpu)
        kernels = [kernel for kernel in find_kernels(op, formats) if kernel.min_capability <= limit]
        for name in models:
            _add_model(name, kernels, formats is not None, list(batches), gpu, add)
    if not found:
        kept = ", ".join(formats or ["any format"])
        raise ValueError(f"format: expected a kernel that runs on {gpu.name}; got {kept}")
    return list(found.values())


def _add_model(
    name: str, kernels: Sequence[Kernel], is_asked: bool, batches: Sequence[int], gpu: Gpu, add: _Add
) -> None:
    model = load_model(name)
    own = PRECISIONS.get(model.native_precision or "")
    for batch in batches:
        deployment = Deployment(1, 1, 1, _QUANTIZED, batch, 1)
        for call in decode_plan(model, gpu, deployment, check_memory=False):
            fields = op_fields(call.op)
            if fields is None:
                continue
            fitting = [kernel for kernel in kernels if kernel.op == call.op.kind]
            if not is_asked and own is not None:
                native = [k for k in fitting if (k.weight, k.activation) == (own.linear, own.linear_activation)]
                fitting = native or fitting
            for kernel in fitting:
                add(kernel, fields, f"{model.name} {call.name}")
            for peer in peers_of(fitting):
                add(peer, fields, f"{model.name} {call.name}")


def op_fields(op: Op) -> tuple[tuple[str, int], ...] | None:
    """The shape of an op that the registry has kernels for; None of any other: router and LM head stay BF16."""
    if isinstance(op, Gemm) and op.weight == _QUANTIZED.linear:
        return (("m", op.m), ("n", op.n), ("k", op.k))
    return None


def peers_of(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The libraries' kernels to set beside these: of the same op, at the matrix rate of their activations."""
    rates = {(kernel.op, FORMATS[kernel.activation].matrix_rate) for kernel in kernels}
    rates |= {(op, "fp8") for op, rate in rates if rate == "fp4"}  # no library kernel at the FP4 rate here
    return [peer for peer in PEERS if (peer.op, FORMATS[peer.activation].matrix_rate) in rates]


def known_ops() -> list[str]:
    return list(dict.fromkeys([*(kernel.op for kernel in KERNELS), COPY.op]))
