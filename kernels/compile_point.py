"""One way a kernel is compiled, as data: what inspection without a GPU needs. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .formats import MATRIX_RATES

CONSTEXPR = "constexpr"


@dataclass(frozen=True)
class CompilePoint:
    """One kernel with its argument types, its tile and its options; no tensors.

    "Value" is one value of the operand whose arrival from memory paces the kernel: a weight of a
    small matmul, an element of K or V of a decode attention. "Trip" is one iteration of the hot
    loop as the source writes it; a compiler's unrolling is found and divided out.

    Attributes:
        name: unique among the points inspected together: "scaled_matmul/w4a16_mxfp4/m16".
        module: an importable module, or the path of a ``.py`` file (its folder becomes importable).
        function: name of the ``@triton.jit`` function in it; decorators around it are looked through.
        signature: every argument and its Triton type ("*bf16", "*u8", "i32", "constexpr",
            "tensordesc<bf16[64,64]>"), in any order.
        constexprs: the value of every argument of type "constexpr": what JSON can hold, tuples,
            and types of ``triton.language`` written "tl.bfloat16". An argument that is None at
            launch, or that Triton specialises because it is 1, is a constexpr as well.
        aligned: arguments divisible by 16, as a launch with such pointers and sizes finds them.
        values_per_iteration: values one program (all its CTAs) consumes per trip; of a kernel
            without a loop, values per program.
        bits_per_value: bits one value costs in memory, its share of the scales included.
        flops_per_value: matrix flops the program issues per value: 2 x the tile's rows on the
            other side, padding included. 0 for a kernel without matrix work.
        matrix_rate: the rate of these flops, one of ``formats.MATRIX_RATES``.
        expect: regular expression that some matrix instruction of the hot loop must match, by its
            SASS name ("HGMMA.64x16x16.F32.BF16") or its PTX name, which is the one that tells the
            kinds of tcgen05 apart ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32").
        max_instructions_per_value: most SASS instructions per value in the hot loop; None: no limit.
        archs: the architectures this point is for ("sm_90"), since tiles and expectations belong
            to one; empty: any.
        options: further compiler options ("maxnreg", "num_ctas", "launch_pdl", ...) and their values.
    """

    name: str
    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    values_per_iteration: int
    bits_per_value: float
    flops_per_value: float
    matrix_rate: str
    expect: str = ""
    max_instructions_per_value: float | None = None
    archs: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for field in ("signature", "constexprs", "options"):
            names = [name for name, _ in getattr(self, field)]
            if len(set(names)) != len(names):
                raise ValueError(f"{field}: expected each name once; got {', '.join(names)} ({self.name})")
        types = dict(self.signature)
        marked = {name for name, kind in types.items() if kind == CONSTEXPR}
        given = {name for name, _ in self.constexprs}
        if marked != given:
            got = ", ".join(sorted(marked ^ given))
            raise ValueError(
                f"constexprs: expected a value for every constexpr argument; differs in {got} ({self.name})"
            )
        stray = sorted(set(self.aligned) - (set(types) - marked))
        if stray:
            raise ValueError(
                f"aligned: expected arguments that are not constexpr; got {', '.join(stray)} ({self.name})"
            )
        for field in ("num_warps", "num_stages", "values_per_iteration", "bits_per_value"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected more than 0; got {getattr(self, field)!r} ({self.name})")
        if not self.flops_per_value >= 0:
            raise ValueError(f"flops_per_value: expected at least 0; got {self.flops_per_value!r} ({self.name})")
        if self.matrix_rate not in MATRIX_RATES:
            expected = ", ".join(MATRIX_RATES)
            raise ValueError(f"matrix_rate: expected one of {expected}; got {self.matrix_rate!r} ({self.name})")

        try:
            json.dumps(self.compiler_inputs())
        except TypeError as error:
            raise ValueError(f"constexprs, options: expected what JSON can hold; {error} ({self.name})") from None

    def compiler_inputs(self) -> dict[str, Any]:
        """What the compiler sees, as JSON holds it; nothing that only judges the result."""
        return {
            "module": self.module,
            "function": self.function,
            "signature": dict(self.signature),
            "constexprs": dict(self.constexprs),
            "aligned": list(self.aligned),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "options": dict(self.options),
        }


Task = tuple[CompilePoint, str]
"""A point and the architecture that it is compiled for."""


def tasks_of(points: Iterable[CompilePoint], archs: Sequence[str]) -> list[Task]:
    """Every point on every one of ``archs`` that it is for."""
    return [(point, arch) for point in points for arch in archs if not point.archs or arch in point.archs]


def only(tasks: Iterable[Task]) -> list[CompilePoint]:
    """Points that are for the architectures of ``tasks`` alone."""
    return [replace(point, archs=(arch,)) for point, arch in tasks]
