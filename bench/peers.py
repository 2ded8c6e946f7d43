"""What tokenfab's kernels are set beside: the libraries' kernels, and a copy. Rows as in the registry; no torch.

torch's own are always here. Any other library is measured where it is installed: in the environment, or as a folder on
PYTHONPATH. Where it is not, or has no kernel for the GPU, ``absence`` says so, and nothing of it is imported. The
kernels of vLLM, SGLang and TensorRT-LLM on the same GPU are in the published tables too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..kernels.attention_points import attention_work
from ..kernels.mla_points import mla_work
from ..kernels.registry import Kernel, Shape, Work, gemm_work, moe_work
from .device import MethodUnavailable
from .foreign import ForeignCode


class PeerError(MethodUnavailable):
    """A library's code raised at a shape; that shape gets no time, and stops no other."""


@dataclass(frozen=True)
class Library:
    """Where a library's kernels are, and what names their version.

    Attributes:
        module: what must be importable.
        distribution: whose version it is; "" where it comes as a folder, whose files then name it.
    """

    module: str
    distribution: str = ""


TORCH = Library("torch", "torch")
LIBRARIES: Mapping[str, Library] = {
    "deep_gemm": Library("deep_gemm"),
    "fa3": Library("fa3_fwd_interface", "fa3-fwd"),
    "flash_mla": Library("flash_mla", "sgl-flash-mla"),
    "flashinfer": Library("flashinfer", "flashinfer-python"),
    "torch": TORCH,
    "torchao": Library("torchao", "torchao"),
    "triton_kernels": Library("triton_kernels"),
}
"""By the first word of ``Kernel.library``."""


@dataclass(frozen=True)
class Peer(Kernel):
    """A library's kernel.

    Attributes:
        archs: ten times the compute capabilities it has kernels for; () for all from ``min_capability`` on.
        fits: whether it runs a shape.
    """

    archs: tuple[int, ...] = ()
    fits: Callable[[Shape], bool] = lambda shape: True

    @property
    def package(self) -> Library:
        return LIBRARIES[self.library.split(".")[0]]

    def load(self) -> Any:
        return _Guarded(self)


class _Guarded:
    """A runnable whose calls raise ``PeerError`` for what the library raises, an import that fails included."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        with ForeignCode(peer.name, "import", PeerError):
            self._run = Kernel.load(peer)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._run, name)

        def guarded(*arguments: Any, **options: Any) -> Any:
            with ForeignCode(self._peer.name, name, PeerError):
                return method(*arguments, **options)

        return guarded


# -- what is here ------------------------------------------------------------------------------------


def absence(kernel: Kernel, limit: int | None = None) -> str:
    """Why a library's kernel cannot be measured, "" where it can. Imports nothing.

    Args:
        limit: ten times a GPU's compute capability; None to ask for the package alone.
    """
    if not isinstance(kernel, Peer):
        return ""
    if limit is not None and (limit < kernel.min_capability or (kernel.archs and limit not in kernel.archs)):
        wanted = (
            " or ".join(f"{arch / 10:.1f}" for arch in kernel.archs) or f"{kernel.min_capability / 10:.1f} or later"
        )
        return f"expected compute capability {wanted}; got {limit / 10:.1f}"
    return "" if kernel.package is TORCH else _missing(kernel.package)


def _missing(library: Library) -> str:
    if importlib.util.find_spec(library.module) is None:
        wanted = f"package {library.distribution}" if library.distribution else "its folder on PYTHONPATH"
        return f"module {library.module}: expected {wanted}; found none"
    if library.distribution:
        try:
            importlib.metadata.version(library.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"module {library.module}: expected that of package {library.distribution}; found another's"
    return ""


def version_sources(kernel: Kernel, torch_version: str) -> dict[str, str]:
    """What names the version of a library's kernel, beside its adapter: {distribution: version}; {} of our own."""
    if not isinstance(kernel, Peer):
        return {}
    library = kernel.package
    return {library.distribution or library.module: torch_version if library is TORCH else _version(library)}


@lru_cache
def _version(library: Library) -> str:
    if library.distribution:
        return importlib.metadata.version(library.distribution)
    spec = importlib.util.find_spec(library.module)
    digest = hashlib.sha256()
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".so") and path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# -- rows --------------------------------------------------------------------------------------------


def _peer(
    op: str, weight: str, activation: str, library: str, runnable: str, title: str, min_capability: int,
    work: Callable[[Shape], Work], archs: tuple[int, ...] = (), fits: Callable[[Shape], bool] = lambda shape: True,
) -> Peer:  # fmt: skip
    module = runnable.partition(":")[0]
    return Peer(
        op, weight, activation, title, (f"../bench/{module}.py",), f"..bench.{runnable}", list, work, min_capability,
        library=library, archs=archs, fits=fits,
    )  # fmt: skip


def _gemm(
    weight: str, activation: str, library: str, runnable: str, title: str, min_capability: int, **more: Any
) -> Peer:
    work = gemm_work(weight, activation)
    return _peer("gemm", weight, activation, library, runnable, title, min_capability, work, **more)


def _attention(format: str, library: str, runnable: str, title: str, min_capability: int, **more: Any) -> Peer:
    work = attention_work(format)
    return _peer("attention", format, "bf16", library, runnable, title, min_capability, work, **more)


def _mla(format: str, library: str, runnable: str, title: str, archs: tuple[int, ...] = (), **more: Any) -> Peer:
    return _peer("mla", format, "bf16", library, runnable, title, 80, mla_work(format), archs, **more)


def _moe(
    weight: str, activation: str, library: str, runnable: str, title: str, min_capability: int, **more: Any
) -> Peer:
    work = moe_work(weight, activation)
    return _peer("moe", weight, activation, library, runnable, title, min_capability, work, **more)


def _is_plain(shape: Shape) -> bool:
    """No window, and one query token: torch's attention has causal order from the wrong end."""
    return shape["window"] == 0 and shape["q_len"] == 1


def _is_blocked(shape: Shape) -> bool:
    """Whole blocks, and rows of a weight's scales that are multiples of 16 bytes, as cuBLAS wants them."""
    return shape["n"] % 128 == 0 and shape["k"] % 512 == 0


def _is_deepseek(shape: Shape) -> bool:
    return (shape["kv_lora_rank"], shape["rope_dim"]) == (512, 64)


def _is_flat(shape: Shape) -> bool:
    """Channels in multiples of 16, which a grouped FP8 matmul asks for."""
    return shape["hidden"] % 16 == 0 and shape["inter"] % 16 == 0


def _is_whole(shape: Shape) -> bool:
    """One rank, and whole MXFP4 blocks: how the library leaves out other ranks' experts was not verified."""
    return shape["ep"] == 1 and shape["hidden"] % 32 == 0 and shape["inter"] % 32 == 0


def _fills_heads(shape: Shape) -> bool:
    return shape["q_len"] == 1 and shape["head_dim"] in (64, 128, 256)


ANCHORS: tuple[Peer, ...] = (
    _gemm("bf16", "bf16", "torch.matmul", "peer_runs:TorchMatmul", "cuBLAS BF16", 80),
    _gemm("fp8", "fp8", "torch._scaled_mm", "peer_runs:TorchScaledMm", "cuBLAS FP8, scale per tensor", 89),
    _attention("bf16", "torch.sdpa", "peer_runs:TorchAttention", "torch's attention over K and V without pages", 80,
               fits=_is_plain),
)  # fmt: skip
"""Always here, and timed beside each block of a kernel of ours."""

_FLASHINFER = {"fits": _fills_heads, "min_capability": 80}
_BLOCKED = {"archs": (90,), "fits": _is_blocked}
PEERS: tuple[Peer, ...] = (
    *ANCHORS,
    _gemm("fp8_row", "fp8_row", "torch._scaled_mm", "peer_runs:TorchScaledMm", "FP8, scale per row", 90),
    _gemm("fp8_block", "fp8_group", "torch._scaled_mm", "peer_runs:TorchBlockScaledMm", "cuBLAS FP8, scale per block",
          90, **_BLOCKED),
    _gemm("fp8_block", "fp8_group", "deep_gemm.fp8_gemm_nt", "peer_gemm:DeepGemm", "DeepGEMM", 90, **_BLOCKED),
    _gemm("fp8_block", "fp8_group", "torchao.blockwise_fp8_gemm", "peer_gemm:TorchaoGemm", "torchao's Triton GEMM", 89),
    _moe("bf16", "bf16", "torch.grouped_mm", "peer_moe:TorchGroupedExperts", "grouped_mm, the rest in eager torch", 90,
         fits=_is_flat),
    _moe("fp8_row", "fp8_row", "torch.scaled_grouped_mm", "peer_moe:TorchGroupedExperts",
         "scaled_grouped_mm, the rest in eager torch", 90, archs=(90, 100), fits=_is_flat),
    _moe("bf16", "bf16", "triton_kernels.matmul_ogs", "peer_moe:TritonKernelsExperts",
         "triton_kernels in BF16, SwiGLU in eager torch", 90, archs=(90,), fits=_is_whole),
    _moe("mxfp4", "bf16", "triton_kernels.matmul_ogs", "peer_moe:TritonKernelsExperts",
         "triton_kernels in MXFP4, SwiGLU in eager torch", 90, archs=(90,), fits=_is_whole),
    _attention("bf16", "flashinfer.decode", "peer_attention:FlashInferDecode", "FlashInfer, BF16 cache", **_FLASHINFER),
    _attention("fp8", "flashinfer.decode", "peer_attention:FlashInferDecode", "FlashInfer, FP8 cache",
               **_FLASHINFER | {"min_capability": 89}),
    _attention("bf16", "fa3.with_kvcache", "peer_attention:FlashAttention3", "FlashAttention-3, its result copied", 90,
               archs=(90,)),
    _mla("bf16", "flashinfer.mla", "peer_mla:FlashInferMla", "FlashInfer MLA, BF16 cache", fits=_is_deepseek),
    _mla("fp8", "flashinfer.mla", "peer_mla:FlashInferMla", "FlashInfer MLA, FP8 cache", (90,), fits=_is_deepseek),
    _mla("bf16", "flash_mla.with_kvcache", "peer_mla:FlashMla", "FlashMLA, its result copied", (90,),
         fits=lambda shape: _is_deepseek(shape) and shape["page_size"] == 64),
)  # fmt: skip


def fits(kernel: Kernel, shape: Shape) -> bool:
    """Whether a library's kernel runs a shape; True of our own."""
    return not isinstance(kernel, Peer) or kernel.fits(shape)


COPY_SHAPES = ({"num_bytes": 1 << 28}, {"num_bytes": 1 << 30})
"""Far more than any L2."""


def _copy_work(shape: Shape) -> Work:
    return Work(0, 2 * shape["num_bytes"], 0.0)


COPY = _peer(
    "copy", "bf16", "bf16", "torch.copy_", "peer_runs:Copy", "device copy: the bandwidth that is there", 80, _copy_work
)
"""Bytes count twice: read and written."""
