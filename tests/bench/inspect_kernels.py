"""Tiny kernels for the tests of inspection, compiled by a child process that finds this file by its path."""

# Triton compiles this file; what its own annotations promise a type checker is not so.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul(x_ptr, w_ptr, y_ptr, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + offs_m[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.bfloat16))


@triton.jit
def matmul_warp_specialized(
    x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    start_n = tl.program_id(0) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, K // BLOCK_K, warp_specialize=True):
        acc = tl.dot(x_desc.load([0, i * BLOCK_K]), w_desc.load([start_n, i * BLOCK_K]).T, acc)
    offs_m, offs_n = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.bfloat16))


@triton.jit
def scaled_matmul(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """FP4 x FP4, a scale per GROUP values of both."""
    offs_m, offs_b, offs_g = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // GROUP)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, K // BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * (K // 2) + offs_b[None, :] + i * (BLOCK_K // 2))
        w = tl.load(w_ptr + offs_n[None, :] * (K // 2) + offs_b[:, None] + i * (BLOCK_K // 2))
        x_scale = tl.load(x_scale_ptr + offs_m[:, None] * (K // GROUP) + offs_g[None, :] + i * (BLOCK_K // GROUP))
        w_scale = tl.load(w_scale_ptr + offs_n[:, None] * (K // GROUP) + offs_g[None, :] + i * (BLOCK_K // GROUP))
        acc = tl.dot_scaled(x, x_scale, "e2m1", w, w_scale, "e2m1", acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.bfloat16))


@triton.jit
def weight_only_matmul(
    x_ptr, w_ptr, scale_ptr, y_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """FP4 weights as the M side, BF16 activations: the plain kernel that decoding by hand must beat."""
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    offs_b, offs_g = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // GROUP)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + offs_m[None, :] * K + offs_k[:, None]
    w_ptrs = w_ptr + offs_n[:, None] * (K // 2) + offs_b[None, :]
    scale_ptrs = scale_ptr + offs_n[:, None] * (K // GROUP) + offs_g[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(0, K // BLOCK_K):
        w, x, scale = tl.load(w_ptrs), tl.load(x_ptrs), tl.load(scale_ptrs)
        acc = tl.dot_scaled(w, scale, "e2m1", x, None, "bf16", acc)
        w_ptrs += BLOCK_K // 2
        x_ptrs += BLOCK_K
        scale_ptrs += BLOCK_K // GROUP
    tl.store(y_ptr + offs_m[None, :] * N + offs_n[:, None], acc.to(tl.bfloat16))


@triton.jit
def double(x_ptr, y_ptr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """No loop, no matrix work."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, (tl.load(x_ptr + offs) * 2).to(DTYPE))


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK + 1,), tl.float32))


@triton.constexpr_function
def _crash():
    __import__("os").abort()


@triton.constexpr_function
def _hang():
    __import__("time").sleep(600)


@triton.jit
def aborts(x_ptr):
    _crash()


@triton.jit
def hangs(x_ptr):
    _hang()


not_a_kernel = 1
