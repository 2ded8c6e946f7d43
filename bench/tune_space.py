"""Which tiles a kernel could have at a shape, and the reason for each one that it cannot, or that is not worth a look.

A space is the product of a few sizes; rules take tiles out of it before anything is compiled: the kernel's own limits,
what does the same work twice over, what cannot fit. A tile is never taken out for a guess at its speed: that is for
inspection and measurement. The default of ``tiles.py`` is never taken out.

Math: trips = ceil(K / block_k); a pipeline of s stages holds at least s - 1 trips' operands. Needs no torch.

Errors: ``ValueError`` for an op whose kernels do not take their tile from ``tiles.py``.

Source: DeepGEMM's heuristics (a reason beside each pruning rule); PTX ISA, wgmma and tcgen05 (64 or 128 rows on the M
side of an instruction).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.attention_points import kv_tokens
from ..kernels.formats import get_format
from ..kernels.kv_layout import KvLayout, MlaLayout
from ..kernels.matmul_points import BLOCK_SCALED_FORMATS, FP8_FORMATS
from ..kernels.moe_work import local_experts
from ..kernels.registry import Kernel, Shape
from ..kernels.tiles import ANY_NUMBER, TILES, Tile, TileRow, find_row
from ..kernels.tuned import Sizes, TunedTile, sizes_of
from .sm_limits import SM_LIMITS

TUNED_OPS = ("gemm", "moe", "attention", "mla")

GROUP = 128
"""Columns that share an FP8 scale, and of a tile of prepared FP4 weights."""

_TENSOR_MEMORY_ARCHS = ("sm_100", "sm_103")
_SYSTEM_BYTES = 1024
_MAX_ACCUMULATOR = 224
"""Registers of a thread's 255 that accumulators may fill: addresses, scales and masks want some."""


@dataclass(frozen=True)
class Place:
    """What ``find_tile`` is asked at one shape on one architecture.

    Attributes:
        row: of ``tiles.py``, the default. format: as there.
        sizes: as in ``kernels.tuned``.
        rows: that share a weight: tokens, twice an expert's average rows, query rows of a KV head.
        columns: K of each matmul; none where the loop runs over tokens.
        depth: values of a row of the streamed operand per trip; 0: the tile's block_k.
        weight_bits, activation_bits: of one value in flight, scales included; 0 for activations held in registers.
    """

    row: TileRow
    format: str
    arch: str
    sizes: Sizes
    rows: int
    columns: tuple[int, ...]
    depth: int
    weight_bits: float
    activation_bits: float

    @property
    def kernel(self) -> str:
        return self.row.kernel

    @property
    def default(self) -> Tile:
        return self.row.tile

    @property
    def is_many(self) -> bool:
        """Whether tokens stand on the M side of ``block_scaled``'s instruction."""
        return self.row.max_tokens == ANY_NUMBER

    def tuned(self, tile: Tile) -> TunedTile:
        return TunedTile(self.kernel, self.format, self.arch, self.sizes, tile)

    def launched(self, tile: Tile) -> Tile:
        """The tile that a launch makes of it: prepared FP4 weights are taken in pairs of tiles only if these divide."""
        is_odd = all(-(-columns // GROUP) % 2 for columns in self.columns)
        in_pairs = self.kernel.endswith(("w4a16", "w4a8")) and tile.block_k == 2 * GROUP
        return dataclasses.replace(tile, block_k=GROUP) if in_pairs and is_odd else tile

    def stage_bytes(self, tile: Tile) -> int:
        """One trip's operands."""
        weights = tile.block_n * (self.depth or tile.block_k) * self.weight_bits
        return round((weights + tile.block_m * tile.block_k * self.activation_bits) / 8)


def place_of(kernel: Kernel, shape: Shape, arch: str) -> Place:
    """The place of a registry kernel at a shape of ``targets``.

    Raises:
        ValueError: an op that has no tiles to choose from.
    """
    make = {"gemm": _gemm, "moe": _moe, "attention": _attention, "mla": _mla}.get(kernel.op)
    if make is None or kernel.library:
        raise ValueError(f"op: expected one of {', '.join(TUNED_OPS)}; got {kernel.name}")
    return make(kernel, shape, arch)


def _bits(format: str) -> float:
    return get_format(format).bits_per_value


def _table_key(kernel: Kernel) -> tuple[str, str]:
    """Name and format in ``tiles.py`` of the matmul of a pair; "fp8" stands for FP8 and BF16 as they are stored."""
    pair = (kernel.weight, kernel.activation)
    for name, formats in BLOCK_SCALED_FORMATS.items():
        if pair == formats:
            return "block_scaled", name
    if kernel.weight in ("mxfp4", "nvfp4"):
        return ("w4a16", kernel.weight) if kernel.activation == "bf16" else ("w4a8", kernel.activation)
    return "fp8", next((name for name, formats in FP8_FORMATS.items() if pair == formats), kernel.weight)


def _gemm(kernel: Kernel, shape: Shape, arch: str) -> Place:
    name, format = _table_key(kernel)
    m, k = shape["m"], shape["k"]
    if name == "fp8" and m > max(row.max_tokens for row in TILES if row.kernel == "fp8"):
        name = "fp8_many"
    sizes = sizes_of({"tokens": m, "n": shape["n"], "k": k})
    return Place(find_row(name, format, arch, m), format, arch, sizes, m, (k,), 0, _bits(kernel.weight),
                 _bits(kernel.activation))  # fmt: skip


def _moe(kernel: Kernel, shape: Shape, arch: str) -> Place:
    name, format = _table_key(kernel)
    name, format = ("grouped", kernel.weight) if name == "fp8" else (f"grouped_{name}", format)
    hidden, inter, experts = shape["hidden"], shape["inter"], shape["num_experts"]
    num_rows = shape["num_tokens"] * shape["top_k"]
    twice = -(-2 * num_rows // experts)
    load = min(max(_next_power_of_2(twice), 16), 64)  # as ``grouped_experts.choose_tile``
    sizes = sizes_of({
        "tokens": load, "rows": num_rows, "experts": experts, "local_experts": local_experts(shape), "hidden": hidden,
        "inter": inter,
    })  # fmt: skip
    return Place(find_row(name, format, arch, load), format, arch, sizes, twice, (hidden, inter), 0,
                 _bits(kernel.weight), _bits(kernel.activation))  # fmt: skip


def _cached(shape: Shape) -> dict[str, int]:
    pages = -(-shape["length"] // shape["page_size"])
    return {"batch": shape["batch"], "max_tokens": pages * shape["page_size"]}


def _attention(kernel: Kernel, shape: Shape, arch: str) -> Place:
    head_dim, kv_heads = shape["head_dim"], shape["num_kv_heads"]
    rows = shape["num_heads"] // kv_heads * shape["q_len"]
    sizes = sizes_of({"tokens": rows, "kv_heads": kv_heads, "window": shape["window"]} | _cached(shape))
    bits = KvLayout(kernel.weight, head_dim, shape["page_size"]).bits_per_value
    row = find_row(f"attention_d{head_dim}", kernel.weight, arch, rows)
    return Place(row, kernel.weight, arch, sizes, rows, (), 2 * head_dim, bits, 0)


def _mla(kernel: Kernel, shape: Shape, arch: str) -> Place:
    rank, rope = shape["kv_lora_rank"], shape["rope_dim"]
    rows = shape["num_heads"] * shape["q_len"]
    bits = MlaLayout(kernel.weight, rank, rope, shape["page_size"]).bits_per_value
    sizes = sizes_of({"tokens": rows} | _cached(shape))
    return Place(
        find_row("mla_attention", kernel.weight, arch, rows), kernel.weight, arch, sizes, rows, (), rank + rope, bits, 0
    )


def seen_tokens(shape: Shape) -> int:
    """Cached tokens that each sequence reads."""
    return kv_tokens({"window": 0} | dict(shape))


# -- rules -----------------------------------------------------------------------------------------


class Dropped(NamedTuple):
    """A tile that is not considered further, and why."""

    tile: Tile
    reason: str


Rule = tuple[str, Callable[[Tile, Place], bool]]
"""A reason, and whether it speaks against the tile."""


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _is_padding(tile: Tile, place: Place) -> bool:
    least = max(SPACES[place.kernel].block_m[0], place.default.block_m)
    return tile.block_m > max(least, _next_power_of_2(place.rows))


def _is_too_large(tile: Tile, place: Place) -> bool:
    least = (tile.num_stages - 1) * place.stage_bytes(tile)
    return least > SM_LIMITS[place.arch].shared_bytes - _SYSTEM_BYTES


def _outlasts(tile: Tile, place: Place) -> bool:
    trips = max((-(-columns // tile.block_k) for columns in place.columns), default=0)
    return 0 < trips < tile.num_stages and tile.num_stages > 2


def _spills(tile: Tile, place: Place) -> bool:
    """FP8 and W4A8 add scaled products to a second accumulator. Tensor memory holds the first elsewhere."""
    accumulators = 1 if place.activation_bits > 9 or "block_scaled" in place.kernel else 2
    registers = accumulators * tile.block_m * tile.block_n // (32 * tile.num_warps)
    return place.arch not in _TENSOR_MEMORY_ARCHS and registers > _MAX_ACCUMULATOR


_PADDING: Rule = ("padding: rows beyond those there are, which a smaller tile does without", _is_padding)
_REREADS: Rule = (
    "re-reads: more than four blocks of rows stream the same weights, where a taller tile reads them less often",
    lambda tile, place: 4 * tile.block_m < min(place.rows, 256),
)
_STAGES_RULE: Rule = ("stages: more buffers than the loop over k has trips", _outlasts)
_SHARED_MEMORY: Rule = ("shared memory: the operands in flight alone exceed an SM's", _is_too_large)
_REGISTERS: Rule = ("registers: the accumulators alone leave a thread no room", _spills)
_W4A8_SIZES: Rule = (
    "kernel: 64 rows go with 128 channels only",
    lambda tile, place: (tile.block_m, tile.block_n) == (64, 256),
)
_WEIGHT_ROWS: Rule = (
    "warps: a warpgroup's instruction takes 64 rows of weights, and the tile has fewer for each",
    lambda tile, place: place.arch == "sm_90" and tile.block_n < 16 * tile.num_warps,
)
_TOKEN_ROWS: Rule = (
    "warps: a warpgroup's instruction takes 64 tokens, and the tile has fewer for each",
    lambda tile, place: place.arch == "sm_90" and tile.block_m < 16 * tile.num_warps,
)
_NATIVE_ROWS: Rule = (
    "native: the block-scaled instruction takes 128 rows of weights, or tokens beyond 64; with fewer Triton widens "
    "both sides to BF16",
    lambda tile, place: place.arch in _TENSOR_MEMORY_ARCHS and (tile.block_m if place.is_many else tile.block_n) < 128,
)
_CACHE_ROWS: Rule = (
    "warps: each warpgroup scores 64 tokens, and the tile has fewer for each",
    lambda tile, place: place.arch != "sm_120" and tile.num_warps == 8 and tile.block_n < 128,
)
_COMMON = (_PADDING, _REREADS, _STAGES_RULE, _SHARED_MEMORY)


@dataclass(frozen=True)
class Space:
    """The sizes to combine, smallest first, and the rules."""

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    block_k: tuple[int, ...]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]
    rules: tuple[Rule, ...]

    def tiles(self) -> Iterator[Tile]:
        sizes = (self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages)
        return (Tile(*each) for each in itertools.product(*sizes))


_FEW, _ROWS, _WIDE = (16, 32, 64), (16, 32, 64, 128), (128, 256)
_FP4 = (*_COMMON, _REGISTERS)
SPACES: dict[str, Space] = {
    "fp8": Space(_FEW, (64, *_WIDE), (128,), (4, 8), (2, 3, 4, 5, 6), (*_COMMON, _WEIGHT_ROWS, _REGISTERS)),
    "fp8_many": Space((64, *_WIDE), (64, *_WIDE), (128,), (4, 8), (2, 3, 4), (*_COMMON, _TOKEN_ROWS, _REGISTERS)),
    "w4a16": Space(_ROWS, _WIDE, _WIDE, (4,), (2, 3, 4, 5), _FP4),
    "w4a8": Space(_FEW, _WIDE, _WIDE, (4,), (2, 3, 4, 5), (_W4A8_SIZES, *_FP4)),
    "block_scaled": Space(_ROWS, (64, *_WIDE), _WIDE, (4, 8), (2, 3, 4), (_NATIVE_ROWS, *_FP4)),
    "grouped": Space(_ROWS, _WIDE, (128,), (4, 8), (2, 3, 4, 5), (*_COMMON, _WEIGHT_ROWS, _REGISTERS)),
    "grouped_w4a16": Space(_ROWS, _WIDE, _WIDE, (4,), (2, 3, 4), _FP4),
    "grouped_w4a8": Space(_FEW, _WIDE, _WIDE, (4,), (2, 3, 4), (_W4A8_SIZES, *_FP4)),
    "grouped_block_scaled": Space(_ROWS, (128,), _WIDE, (4, 8), (2, 3, 4), _FP4),
    **{
        f"attention_d{dim}": Space((8, 16, 32, 64), (32, 64, 128), (dim,), (4, 8), (2, 3, 4), (*_COMMON, _CACHE_ROWS))
        for dim in (64, 128, 256)
    },
    "mla_attention": Space((16, 32, 64), (32, 64, 128), (128, 256, 512), (4, 8), (2, 3), _COMMON),
}  # fmt: skip
"""By kernel of ``tiles.py``. What has one value is the kernel's own: 128 of k share an FP8 scale; prepared FP4 weights
have the fragments of 4 warps, 128 or 256 channels; the experts' block-scaled loop has 128; attention's block_k is the
head dim, MLA's the channels per load."""


def candidates(place: Place) -> tuple[list[Tile], list[Dropped]]:
    """(the tiles to inspect, the default first; those dropped, each with the first rule against it)."""
    kept, dropped = [place.default], []
    launched = {place.launched(place.default)}
    for tile in SPACES[place.kernel].tiles():
        if tile == place.default:
            continue
        against = next((reason for reason, speaks in SPACES[place.kernel].rules if speaks(tile, place)), None)
        if against is None and place.launched(tile) in launched:
            against = "pairs: an odd number of tiles along k is taken one by one, as by another tile here"
        if against is None:
            kept.append(tile)
            launched.add(place.launched(tile))
        else:
            dropped.append(Dropped(tile, against))
    return kept, dropped
