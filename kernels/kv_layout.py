"""Where every byte of a paged KV cache lies. Standard library only.

A cache is (num_pages, num_kv_heads, ``record_bytes``) uint8; entry p of a sequence's page table is the page of its
tokens from p x page_size on.
One record, of one page and head, is four arrays one behind the other, all little-endian:

==============  ========================================  ======================================================
GQA             bf16, fp8, fp8_row                        mxfp4, nvfp4
==============  ========================================  ======================================================
K codes         [page_size][head_dim] elements            [page_size][head_dim / 8] words of 32 bits
V codes         [head_dim][page_size] elements            [head_dim / 2][page_size] bytes
K scales        fp8_row: [page_size] float32              [page_size][head_dim / block] bytes
V scales        fp8_row: [page_size] float32              [head_dim / block][page_size] bytes
==============  ========================================  ======================================================

V lies channel by channel because FP8 matrix instructions of Hopper read both operands along the summed axis, which is
the tokens there: so V needs no transposition, and no conversion, in the kernel. MLA's record, of a page, which has one
"head":

==============  ===================================================
latent codes    [page_size][kv_lora_rank] elements, bf16 or E4M3
rope codes      [page_size][rope_dim] elements, the same
scales          fp8_row: [page_size] float32, of a token's latent and rope part together
==============  ===================================================

Scales: fp8 has one float32 for all of K and one for all of V (MLA: one), nvfp4 likewise beside its blocks'; they are
``factors`` of the cache, not in the record. fp8_row: one per token and head.

FP4. Codes are E2M1: a sign s and three bits m. A word of K holds channels 8i .. 8i + 7; channel 8i + 2v + h in half h
(0: bits 0-15): s of v = 0, 1, 2, 3 in bits 15, 12, 14, 13, m in bits 8-6, 5-3, 11-9, 2-0. A byte of V holds
channels i (s in bit 7, m in 5-3) and i + head_dim / 2 (s in bit 6, m in 2-0). These places are where decoding to BF16
in registers takes fewest instructions.

A block's scale is one byte. mxfp4: E8M0 up to 160 (2^33); a block with a larger scale, or with NaN, is 161 and reads
as NaN. nvfp4: the E4M3 scale 2^e (1 + m / 8), subnormals normalised, as (e + 22) << 3 | m; NaN is 255.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formats import SCALE_BITS, get_format

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
KV_FORMATS = ("bf16", "fp8", "fp8_row", "mxfp4", "nvfp4")
MLA_FORMATS = ("bf16", "fp8", "fp8_row")

MXFP4_MAX_BYTE = 160
MXFP4_NAN = 161
NVFP4_BIAS = 22
NVFP4_NAN = 255


def _require_one_of(argument: str, got: object, known: tuple[object, ...]) -> None:
    if got not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(map(str, known))}; got {got!r}")


@dataclass(frozen=True)
class KvLayout:
    """Offsets, in bytes, into the record of one page and head; see the module.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    format: str
    head_dim: int
    page_size: int

    def __post_init__(self) -> None:
        _require_one_of("format", self.format, KV_FORMATS)
        _require_one_of("head_dim", self.head_dim, HEAD_DIMS)
        _require_one_of("page_size", self.page_size, PAGE_SIZES)

    @property
    def codes_bytes(self) -> int:
        """Of K, and of V."""
        return self.page_size * self.head_dim * get_format(self.format).element_bits // 8

    @property
    def scales_bytes(self) -> int:
        """Of K, and of V."""
        row = get_format(self.format)
        if row.block is not None:
            return self.page_size * self.head_dim // row.block[1]
        return self.page_size * SCALE_BITS[row.scale] // 8 if row.scale_per == "row" else 0

    @property
    def v_codes(self) -> int:
        return self.codes_bytes

    @property
    def k_scales(self) -> int:
        return 2 * self.codes_bytes

    @property
    def v_scales(self) -> int:
        return 2 * self.codes_bytes + self.scales_bytes

    @property
    def record_bytes(self) -> int:
        return 2 * (self.codes_bytes + self.scales_bytes)

    @property
    def bits_per_value(self) -> float:
        """Of K and V, scales included."""
        return 8 * self.record_bytes / (2 * self.page_size * self.head_dim)


@dataclass(frozen=True)
class MlaLayout:
    """The same of a latent cache.

    Raises:
        ValueError: as ``KvLayout``.
    """

    format: str
    kv_lora_rank: int
    rope_dim: int
    page_size: int

    def __post_init__(self) -> None:
        _require_one_of("format", self.format, MLA_FORMATS)
        _require_one_of("kv_lora_rank", self.kv_lora_rank, (256, 512))
        _require_one_of("rope_dim", self.rope_dim, (32, 64))
        _require_one_of("page_size", self.page_size, PAGE_SIZES)

    @property
    def element_bytes(self) -> int:
        return get_format(self.format).element_bits // 8

    @property
    def rope_codes(self) -> int:
        return self.page_size * self.kv_lora_rank * self.element_bytes

    @property
    def scales(self) -> int:
        return self.page_size * (self.kv_lora_rank + self.rope_dim) * self.element_bytes

    @property
    def record_bytes(self) -> int:
        return self.scales + (4 * self.page_size if self.format == "fp8_row" else 0)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.record_bytes / (self.page_size * (self.kv_lora_rank + self.rope_dim))
