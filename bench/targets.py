"""What to bench: kernels of the registry at the shapes that real models' decode plans ask for.

So a record lines up with the published row of the same shape on the same GPU. Quantizers stand where a step quantizes:
with the norms before attention and FFN, with SwiGLU (of the routed experts too, a row per token and expert), and alone
before the output projection. MLA's norms of latents have no residual and are left out. Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..kernels.formats import FORMATS
from ..kernels.registry import OPS, Kernel, find_kernels
from .decode_plan import OpCall, decode_plan
from .deployment import PRECISIONS, Deployment, Precision
from .gpus import Gpu
from .model_config import ModelConfig
from .models import load_model
from .ops import Experts, Gemm, MlaAttention, PagedAttention
from .peers import COPY, COPY_SHAPES, PEERS, absence, fits

DEFAULT_MODELS = ("deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b")
DEFAULT_BATCHES = (1, 16, 64, 128, 512, 4096)
DEFAULT_CONTEXTS = (1024, 8192, 131072)
"""Cached tokens of each sequence, where a model takes as many."""

MAX_SEQUENCES = 256
"""Of attention: beyond it, tokens per step are those of prefill."""

MAX_CACHE_BYTES = 16 << 30
"""Of one layer's attention, twice which a GPU of 80 GB holds."""

PAGE_SIZE = 64

_GQA_SHAPES = ((16, 8192, 64, 8, 1), (16, 8192, 64, 8, 4), (128, 2048, 32, 8, 1), (1, 8192, 64, 8, 1))
_MLA_SHAPES = ((32, 32768, 128, 1), (32, 32768, 128, 4))
"""Batch, length, heads (KV heads), query tokens, at which stacks are usually compared; head dim 128, latents of 576."""

EXPERT_PARALLEL = {"deepseek-v3": 8, "deepseek-r1": 8, "kimi-k2": 16, "qwen3-235b-a22b": 4}
"""Ranks that the experts of a model are spread over; its tokens are those of all ranks. 1 for any other model."""

LOADS = (0, 101, 120)
"""100 times the exponents of the published tables' power laws; 0: balanced."""

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
        """What a decode step leaves in L2.

        A matmul finds its weights out of it. A quantizer (no format of weights) reads what the kernel before it has
        just written, which fits into L2, and writes what the next one reads: hot, a norm's few weights with them; where
        a large batch does not fit, it does not here either. A copy, to show memory's bandwidth, finds nothing.
        """
        if not self.kernel.weight:
            return "hot"
        return "cold_weights" if self.kernel.work(self.shape).weight_bytes else "cold_all"


_Fields = tuple[tuple[str, int], ...]
_Add = Callable[[Kernel, _Fields, str], None]


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
    op: str | None, formats: Sequence[str] | None, models: Iterable[str], batches: Iterable[int], gpu: Gpu,
    contexts: Sequence[int] = DEFAULT_CONTEXTS, *, extra: Sequence[Kernel] = (), shapes: Sequence[_Fields] = (),
) -> list[Target]:  # fmt: skip
    """The kernels that run on ``gpu``, and the libraries' that are here beside them, at the shapes of ``models``.

    Args:
        op: one of ``known_ops``, or None for all. formats: as in ``find_kernels``; None: for each model those of its
            checkpoint, or all where no kernel has these.
        batches: tokens per GPU and step; for attention, sequences, up to ``MAX_SEQUENCES``.
        contexts: cached tokens of a sequence.
        extra: kernels of the same op and formats that are not in the registry, beside it.
        shapes: as ``shape_fields`` reads them, of ``op``, in place of the models'.

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
        kernels = [*extra, *kernels]
        for name in () if shapes else models:
            _add_model(name, kernels, formats is not None, list(batches), contexts, gpu, add)
        for kernel in (*kernels, *peers_here(kernels, limit)):
            for fields in shapes or _compared_shapes(kernel.op):
                if fits(kernel, dict(fields)):
                    add(kernel, fields, "asked" if shapes else "compared")
    if not found:
        kept = ", ".join(formats or ["any format"])
        raise ValueError(f"format: expected a kernel that runs on {gpu.name}; got {kept}")
    return list(found.values())


def _add_model(
    name: str, kernels: Sequence[Kernel], is_asked: bool, batches: Sequence[int], contexts: Sequence[int], gpu: Gpu,
    add: _Add,
) -> None:  # fmt: skip
    model = load_model(name)
    own = PRECISIONS.get(model.native_precision or "")
    lengths = sorted({min(context, model.max_context) for context in contexts})
    for batch, length in itertools.product(batches, lengths):
        deployment = Deployment(1, 1, 1, _QUANTIZED, batch, length)
        for call in decode_plan(model, gpu, deployment, check_memory=False):
            for op, fields, place in op_shapes(call, model, deployment.rows):
                fitting = [kernel for kernel in kernels if kernel.op == op]
                if not is_asked and own is not None:
                    fitting = [kernel for kernel in fitting if _is_native(kernel, own, call)] or fitting
                for kernel in (*fitting, *peers_here(fitting, capability(gpu))):
                    if fits(kernel, dict(fields)) and not _is_too_large(kernel, dict(fields)):
                        add(kernel, fields, f"{model.name} {place}")


def _is_too_large(kernel: Kernel, shape: dict[str, int]) -> bool:
    """Attention over more sequences, or bytes, than are measured."""
    if kernel.op not in ("attention", "mla"):
        return False
    return shape["batch"] > MAX_SEQUENCES or kernel.work(shape).weight_bytes > MAX_CACHE_BYTES


def _compared_shapes(op: str) -> list[_Fields]:
    if op == "attention":
        return [_attention_fields(batch, length, heads, kv_heads, 128, 0, q_len)
                for batch, length, heads, kv_heads, q_len in _GQA_SHAPES]  # fmt: skip
    if op == "mla":
        return [_mla_fields(batch, length, heads, 512, 64, q_len) for batch, length, heads, q_len in _MLA_SHAPES]
    return []


def _attention_fields(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, window: int, q_len: int
) -> _Fields:
    sizes = (("batch", batch), ("length", length), ("num_heads", heads), ("num_kv_heads", kv_heads))
    return (*sizes, ("head_dim", head_dim), ("window", window), ("q_len", q_len), ("page_size", PAGE_SIZE))


def _mla_fields(batch: int, length: int, heads: int, rank: int, rope: int, q_len: int) -> _Fields:
    sizes = (("batch", batch), ("length", length), ("num_heads", heads), ("kv_lora_rank", rank), ("rope_dim", rope))
    return (*sizes, ("q_len", q_len), ("page_size", PAGE_SIZE))


def _is_native(kernel: Kernel, own: Precision, call: OpCall) -> bool:
    """Whether a checkpoint's own formats are those of the kernel; an expert's SwiGLU makes the experts' activations."""
    if isinstance(call.op, PagedAttention | MlaAttention):
        return own.kv in (kernel.weight, kernel.activation)
    experts = isinstance(call.op, Experts)
    weight, activation = (own.experts, own.experts_activation) if experts else (own.linear, own.linear_activation)
    return kernel.weight in ("", weight) and kernel.activation == activation


def op_shapes(call: OpCall, model: ModelConfig, rows: int) -> Iterator[tuple[str, _Fields, str]]:
    """What the registry has kernels for in one call of a plan: op, shape and place.

    Router and LM head stay BF16. ``rows``: of a matmul's activations, as in the plan.
    """

    def quantizer(op: str, num_rows: int, columns: int, place: str) -> tuple[str, _Fields, str]:
        return op, (("rows", num_rows), ("columns", columns)), place

    op, name = call.op, call.name
    if name in ("attention_norm", "ffn_norm"):
        yield quantizer("rms_norm_quantize", rows, model.hidden_size, name)
    elif isinstance(op, Experts):
        sizes = (("num_tokens", op.num_tokens), ("hidden", op.hidden), ("inter", op.inter), ("top_k", op.top_k))
        ep = EXPERT_PARALLEL.get(model.name, 1)
        for load in LOADS:
            yield op.kind, (*sizes, ("num_experts", op.num_experts), ("ep", ep), ("load", load)), name
        yield quantizer("swiglu_quantize", round(op.rows), op.inter // op.tp, "experts_swiglu")
    elif isinstance(op, PagedAttention):
        heads = (("num_heads", op.num_heads), ("num_kv_heads", op.num_kv_heads), ("head_dim", op.head_dim))
        sizes = (op.batch, op.length, op.num_heads, op.num_kv_heads, op.head_dim, op.window or 0, op.q_len)
        yield op.kind, _attention_fields(*sizes), name
        yield "rope_append", (("num_tokens", op.batch * op.q_len), *heads, ("page_size", PAGE_SIZE)), "rope_append"
    elif isinstance(op, MlaAttention) and op.top_k is None:
        latent = (("kv_lora_rank", op.kv_lora_rank), ("rope_dim", op.rope_dim), ("page_size", PAGE_SIZE))
        yield op.kind, _mla_fields(op.batch, op.length, op.num_heads, op.kv_lora_rank, op.rope_dim, op.q_len), name
        yield "mla_append", (("num_tokens", op.batch * op.q_len), ("num_heads", op.num_heads), *latent), "mla_append"
    elif isinstance(op, Gemm) and op.weight == _QUANTIZED.linear:
        yield op.kind, (("m", op.m), ("n", op.n), ("k", op.k)), name
        if name == "o_proj":
            yield quantizer("quantize", op.m, op.k, name)
        elif name.endswith("_down"):
            yield quantizer("swiglu_quantize", op.m, op.k, name.replace("_down", "_swiglu"))


def peers_of(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The libraries' kernels to set beside these: of the same op, at the matrix rate of their activations."""
    rates = {(kernel.op, FORMATS[kernel.activation].matrix_rate) for kernel in kernels}
    rates |= {(op, "fp8") for op, rate in rates if rate == "fp4"}  # no library kernel at the FP4 rate here
    return [peer for peer in PEERS if (peer.op, FORMATS[peer.activation].matrix_rate) in rates]


def peers_here(kernels: Iterable[Kernel], limit: int | None = None) -> list[Kernel]:
    """Those of ``peers_of`` that are installed, and run at compute capability ``limit`` / 10."""
    return [peer for peer in peers_of(kernels) if not absence(peer, limit)]


def absent_peers(op: str | None, formats: Sequence[str] | None, gpu: Gpu) -> dict[str, str]:
    """Why each library's kernel that would stand beside these is not measured, by its name."""
    reasons = {peer.name: absence(peer, capability(gpu)) for peer in peers_of(find_kernels(op, formats))}
    return {name: reason for name, reason in reasons.items() if reason}


SHAPE_NAMES = {
    "gemm": ("m", "n", "k"),
    "moe": ("num_tokens", "hidden", "inter", "top_k", "num_experts", "ep", "load"),
    "attention": ("batch", "length", "num_heads", "num_kv_heads", "head_dim", "window", "q_len", "page_size"),
    "mla": ("batch", "length", "num_heads", "kv_lora_rank", "rope_dim", "q_len", "page_size"),
    "rope_append": ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "page_size"),
    "mla_append": ("num_tokens", "num_heads", "kv_lora_rank", "rope_dim", "page_size"),
    "quantize": ("rows", "columns"),
    "rms_norm_quantize": ("rows", "columns"),
    "swiglu_quantize": ("rows", "columns"),
}
"""As ``op_shapes`` gives them."""

_MAY_BE_ZERO = ("window", "load")


def shape_fields(op: str | None, text: str) -> _Fields:
    """A shape of ``op`` from "m=64,n=7168,k=2048".

    Raises:
        ValueError: no such op, a name that is missing, unknown or there twice, no whole number.
    """
    if op not in SHAPE_NAMES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPE_NAMES)} to have it; got {op or 'no op'}")
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    names = SHAPE_NAMES[op]
    if len(found) != len(pairs) or set(found) != set(names):
        raise ValueError(f"shape: expected {','.join(f'{name}=N' for name in names)} for {op}; got {text!r}")
    for name, value in found.items():
        if not value.isdecimal() or int(value) < (name not in _MAY_BE_ZERO):
            raise ValueError(f"shape: expected a whole number of {name}; got {value!r}")
    return tuple((name, int(found[name])) for name in names)


def known_ops() -> list[str]:
    return [*OPS, COPY.op]
