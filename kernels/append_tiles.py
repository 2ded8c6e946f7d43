"""How the append kernels are cut up and specialised, with the reasons. Standard library only.

The wrappers launch by these functions and ``append_points`` compiles by them, so that what is inspected is what runs.
"""

from __future__ import annotations

from typing import Any

from .kv_layout import KvLayout, MlaLayout
from .quantize_tiles import Launch

STYLES = ("half", "interleaved")

VALUES_PER_PROGRAM = 1024
"""Most values of one program: a step of 64 tokens and 80 heads of 128 is then 640 programs, several per SM, and a
program has 4 warps to hide its two loads in a row, the position and then its cosines."""

VALUES_PER_THREAD = 8
"""One 16-byte load of BF16; 8 codes of E2M1 are one word of K."""

LATENT_WARPS = 4
"""4 values of 512 per thread; the rope part takes as many query heads as fill ``VALUES_PER_PROGRAM``."""


def _heads(num_heads: int, head_dim: int) -> int:
    """Heads of one program: a power of two, not wider than there are."""
    return min(1 << (num_heads - 1).bit_length(), VALUES_PER_PROGRAM // head_dim)


def append_kv_launch(layout: KvLayout, num_kv_heads: int, rotary_dim: int, style: str) -> Launch:
    """Of ``_append_kv_kernel``. Heads of queries are as many: with few KV heads on a GPU there are few queries too."""
    block_h = _heads(num_kv_heads, layout.head_dim)
    constants: dict[str, Any] = {
        "FORMAT": layout.format,
        "HEAD_DIM": layout.head_dim,
        "ROTARY_DIM": rotary_dim,
        "PAGE_SIZE": layout.page_size,
        "CODES_BYTES": layout.codes_bytes,
        "SCALES_BYTES": layout.scales_bytes,
        "IS_INTERLEAVED": style == "interleaved",
        "BLOCK_H": block_h,
    }
    return Launch(constants, max(1, block_h * layout.head_dim // (32 * VALUES_PER_THREAD)))


def append_mla_launch(layout: MlaLayout, num_heads: int, style: str) -> Launch:
    """Of ``_append_mla_kernel``; num_heads: of ``q_rope``, 1 without."""
    constants: dict[str, Any] = {
        "FORMAT": layout.format,
        "RANK": layout.kv_lora_rank,
        "ROPE_DIM": layout.rope_dim,
        "PAGE_SIZE": layout.page_size,
        "RECORD_BYTES": layout.record_bytes,
        "IS_INTERLEAVED": style == "interleaved",
        "BLOCK_H": _heads(num_heads, layout.rope_dim),
    }
    return Launch(constants, LATENT_WARPS)
