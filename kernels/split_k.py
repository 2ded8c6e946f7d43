"""Split-K: where the parts of a sum over k go, and their sum in a fixed order.

A part is an (M, N) float32 matrix; ``splits`` of them stand one behind the other in a workspace. The sum is
always taken in the order of the parts, so a result has the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen

_BLOCK = 1024


@triton.jit
def _sum_splits_kernel(parts_ptr, y_ptr, num_values, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum of the partial results, in the order of the splits: the same bits every time."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_values
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(parts_ptr + split * num_values + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def choose_splits(num_tiles: int, k_tiles: int, num_sms: int, *, ctas_per_sm: int = 2, min_k_tiles: int = 4) -> int:
    """Into how many parts k is split so that ``num_tiles`` programs become enough to fill the GPU.

    No more than ``ctas_per_sm`` programs per SM, since further ones would wait for a second wave, and at least
    ``min_k_tiles`` trips in each, since fewer do not fill the pipeline. Depends on shapes only: graphs replay it.
    """
    wanted = ctas_per_sm * num_sms // max(num_tiles, 1)
    splits = max(1, min(wanted, k_tiles // min_k_tiles))
    return -(-k_tiles // -(-k_tiles // splits))  # no empty part


def arch_of(device: torch.device) -> str:
    """The architecture of a CUDA device, "sm_90"; "" for any other device."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; of any other, a few, so that tests see more than one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check_out(
    out: torch.Tensor | None, tokens: int, rows: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The output: a given one that fits, or a new one.

    Raises:
        ValueError: naming ``out`` or ``out_dtype``.
    """
    require(dtype in (torch.bfloat16, torch.float32), "out_dtype", "bfloat16 or float32", dtype)
    if out is None:
        return torch.empty((tokens, rows), dtype=dtype, device=device)
    fits = tuple(out.shape) == (tokens, rows) and out.dtype == dtype and out.stride(-1) == 1 and out.device == device
    require(fits, "out", f"{dtype} {(tokens, rows)} on {device}, rows contiguous", f"{seen(out)} on {out.device}")
    return out


def plan_splits(split_k: int | None, num_tiles: int, k_tiles: int, device: torch.device) -> tuple[int, int]:
    """(parts, trips per part): as asked, or so many that the programs fill the device.

    Raises:
        ValueError: naming ``split_k``.
    """
    if split_k is None:
        split_k = choose_splits(num_tiles, k_tiles, num_multiprocessors(device))
    require(1 <= split_k <= k_tiles, "split_k", f"1 to {k_tiles}", split_k)
    per_split = triton.cdiv(k_tiles, split_k)
    return triton.cdiv(k_tiles, per_split), per_split  # no empty part


def split_target(out: torch.Tensor, workspace: torch.Tensor | None, splits: int) -> torch.Tensor:
    """What the parts are written to: ``out`` (M, N) itself, or (splits, M, N) of the workspace.

    Raises:
        ValueError: naming ``out`` or ``workspace``.
    """
    if splits == 1:
        return out
    require(out.is_contiguous(), "out", "contiguous where split_k > 1", f"stride {out.stride()}")
    size = splits * out.numel()
    workspace = torch.empty(size, dtype=torch.float32, device=out.device) if workspace is None else workspace
    fits = workspace.dtype == torch.float32 and workspace.numel() >= size and workspace.device == out.device
    require(fits, "workspace", f"float32, at least {size} values on {out.device}", seen(workspace))
    return workspace.view(-1)[:size].view(splits, *out.shape)


def sum_splits(target: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` = the sum of the parts in ``target``; nothing to do where they are one."""
    if target.dim() == 3:
        count = out.numel()
        _sum_splits_kernel[(triton.cdiv(count, _BLOCK),)](target, out, count, SPLITS=target.shape[0], BLOCK=_BLOCK)
