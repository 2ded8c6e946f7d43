"""What one SM holds and issues: limits per architecture, clocks per GPU, occupancy.

Facts with their source, as in ``gpus.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpus import Gpu
from .sass import WARP_SIZE

SCHEDULERS_PER_SM = 4
"""Each issues one warp instruction per cycle (CUDA C++ Programming Guide, every architecture here)."""

_KIB = 1024


@dataclass(frozen=True)
class SmLimits:
    """What one SM holds at a time, and how it hands it out."""

    warps: int
    ctas: int
    shared_bytes: int
    tensor_memory_columns: int = 0
    registers: int = 65536
    registers_unit: int = 256
    shared_unit: int = 128


SM_LIMITS = {
    "sm_90": SmLimits(64, 32, 228 * _KIB),
    "sm_100": SmLimits(64, 32, 228 * _KIB, 512),
    "sm_103": SmLimits(64, 32, 228 * _KIB, 512),
    "sm_120": SmLimits(48, 24, 100 * _KIB),
}
"""Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (24 CTAs and 100 KiB
on 12.x; the Blackwell Tuning Guide has 32 and 128, the latter with L1); PTX ISA, "Tensor Memory". A CTA takes
at most all of an SM's shared memory, the 1 KiB that the system keeps included."""


@dataclass(frozen=True)
class SmClock:
    """The SM clock at which instruction issue is reckoned, and where it is from."""

    hz: float
    source: str


_H100_CLOCK = "the issue budget of 29.6e12 thread instructions/s; the highest clock is 1.98 GHz (unverified)"
SM_CLOCKS = {
    "a100": SmClock(1.410e9, "NVIDIA A100 whitepaper, GPU boost clock"),
    "h100": SmClock(1.755e9, _H100_CLOCK),
    "h200": SmClock(1.755e9, f"as H100: {_H100_CLOCK}"),
    "h800": SmClock(1.755e9, f"as H100, whose die it has (unverified): {_H100_CLOCK}"),
    "rtx_pro_6000": SmClock(2.430e9, "AIC: maximum SM clock the card reports"),
    "rtx_5090": SmClock(2.407e9, "NVIDIA RTX Blackwell whitepaper, boost clock (unverified)"),
}
"""By the name of the row in ``gpus.py``. A GPU not listed has no clock from a source: its issue floor is unknown."""


@dataclass(frozen=True)
class Occupancy:
    ctas_per_sm: int
    warps_per_sm: int
    limited_by: str


def issue_rate(gpu: Gpu, clock_hz: float | None = None) -> float | None:
    """Thread instructions per second of the whole GPU; None where its clock is unknown."""
    clock = SM_CLOCKS.get(gpu.name)
    hz = clock_hz or (clock.hz if clock else None)
    return None if hz is None else gpu.num_sms * SCHEDULERS_PER_SM * WARP_SIZE * hz


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int) -> Occupancy:
    """CTAs and warps that one SM holds at once, and what limits them. Registers go per warp to one of four parts."""
    limits = SM_LIMITS[arch]
    per_warp = -(-registers * WARP_SIZE // limits.registers_unit) * limits.registers_unit
    warps = limits.registers // SCHEDULERS_PER_SM // max(per_warp, 1) * SCHEDULERS_PER_SM
    shared = -(-shared_bytes // limits.shared_unit) * limits.shared_unit
    ctas = {
        "registers": warps // num_warps,
        "shared memory": limits.shared_bytes // max(shared, 1),
        "warps": limits.warps // num_warps,
        "CTAs": limits.ctas,
    }
    if tensor_memory_columns:
        ctas["tensor memory"] = limits.tensor_memory_columns // tensor_memory_columns
    least = min(ctas, key=lambda kind: ctas[kind])
    return Occupancy(ctas[least], ctas[least] * num_warps, least)
