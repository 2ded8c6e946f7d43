"""W8A8 matmul with scales per block in plain Triton: y (m, n) BF16 = x (m, k) . w (n, k)^T, as DeepSeek's checkpoints.

One program per tile of y; scales are applied to the partial sum of each 128 of k. Try next: a split of k where m is
small (few programs stream the weights), more stages, a tile of n that divides into the number of SMs, TMA descriptors.
"""

# pyright: reportCallIssue=false
import torch
import triton
import triton.language as tl


@triton.jit
def _matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, y_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K is 128, what shares a scale; BLOCK_N divides 128, so that a tile has one scale per step of k."""
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < m, offs_n < n
    num_blocks = tl.cdiv(k, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * k + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * k + offs_k[None, :]
    x_scale_ptrs = x_scale_ptr + offs_m * num_blocks
    w_scale_ptrs = w_scale_ptr + tl.program_id(0) * BLOCK_N // 128 * num_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(num_blocks):
        mask_k = block * BLOCK_K + offs_k < k
        x = tl.load(x_ptrs + block * BLOCK_K, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + block * BLOCK_K, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        x_scale = tl.load(x_scale_ptrs + block, mask=mask_m, other=0.0)
        acc += tl.dot(x, tl.trans(w)) * (x_scale * tl.load(w_scale_ptrs + block))[:, None]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * n + offs_n[None, :]
    tl.store(y_ptrs, acc.to(tl.bfloat16), mask=mask_m[:, None] & mask_n[None, :])


TILES = [
    {"block_n": 64, "num_warps": 4, "num_stages": 4},
    {"block_n": 32, "num_warps": 4, "num_stages": 5},
    {"block_n": 128, "num_warps": 4, "num_stages": 3},
    {"block_n": 128, "num_warps": 8, "num_stages": 4},
]  # the first is launched; `tokenfab tune gemm --kernel` measures all


def my_kernel(
    weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: torch.Tensor, *,
    block_n: int, num_warps: int, num_stages: int,
) -> None:  # fmt: skip
    x, x_scale = activations["data"], activations["scale"]  # e4m3 (m, k), float32 (m, k / 128)
    w, w_scale = weights["data"], weights["scale"]  # e4m3 (n, k), float32 (n / 128, k / 128)
    (m, k), n = x.shape, w.shape[0]
    block_m = 16 if m <= 16 else 64
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    _matmul_kernel[grid](
        x, w, x_scale, w_scale, output, m, n, k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=128, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
