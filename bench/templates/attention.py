"""Paged GQA decode over a BF16 cache in plain Triton: o = softmax(q . K^T / sqrt(head_dim)) . V, float32 softmax.

One program per sequence, KV head and query token, over all of the sequence's pages. Try next: a split of long sequences
(few sequences leave most SMs idle) with a second pass that combines the parts, query tokens of one sequence together.

A page's record (tokenfab.kernels.kv_layout): K [page_size][head_dim], then V [head_dim][page_size], of one KV head.
"""

# pyright: reportCallIssue=false
import torch
import triton
import triton.language as tl


@triton.jit
def _attention_kernel(
    q_ptr, pages_ptr, table_ptr, lengths_ptr, out_ptr, scale, stride_table, num_kv_heads, q_len, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    seq, kv_head, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, PAGE)
    end = tl.load(lengths_ptr + seq) - q_len + 1 + token  # causal: the last query token sees all
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    heads = ((seq * q_len + token) * num_kv_heads + kv_head) * GROUP + rows
    places = heads[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :]
    mask_h = (rows < GROUP)[:, None]
    q = tl.load(q_ptr + places, mask=mask_h, other=0.0)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for page in range(first // PAGE, tl.cdiv(end, PAGE)):
        number = tl.load(table_ptr + seq.to(tl.int64) * stride_table + page).to(tl.int64)
        record = pages_ptr + (number * num_kv_heads + kv_head) * (2 * PAGE * HEAD_DIM)
        k = tl.load(record + offs_n[:, None] * HEAD_DIM + offs_d[None, :])
        v = tl.load(record + PAGE * HEAD_DIM + offs_d[:, None] * PAGE + offs_n[None, :])
        tokens = page * PAGE + offs_n
        seen = ((tokens >= first) & (tokens < end))[None, :]
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        p, shrink = tl.exp(scores - new_largest[:, None]), tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(tl.bfloat16), tl.trans(v))
        largest = new_largest
    tl.store(out_ptr + places, (acc / total[:, None]).to(tl.bfloat16), mask=mask_h)


def my_kernel(weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: torch.Tensor) -> None:
    q, lengths = activations["q"], activations["lengths"]  # bf16 (batch x q_len, heads, head_dim), int32 (batch,)
    window = int(activations["window"])  # on the host; 0 for none
    pages, table = weights["pages"], weights["page_table"]  # uint8 (pages, KV heads, record), int32 (batch, pages)
    head_dim, page_size = weights["sizes"].tolist()  # on the host
    batch, num_kv_heads = lengths.numel(), pages.shape[1]
    q_len, group = q.shape[0] // batch, q.shape[1] // num_kv_heads
    _attention_kernel[(batch, num_kv_heads, q_len)](
        q, pages.view(torch.bfloat16), table, lengths, output, head_dim**-0.5, table.stride(0), num_kv_heads, q_len,
        window, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim, PAGE=page_size,
        num_warps=4,
    )  # fmt: skip
