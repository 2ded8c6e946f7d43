"""GPUs: one row each, datasheet peaks with their source. Looked up by exact name or alias.

Sources, named in each row:
    AIC   ``aiconfigurator-core`` 0.12.0, ``systems/*.yaml`` (Apache-2.0)
    SPEC  SemiAnalysisAI/InferenceX-app ``gpu-specs.ts`` @77ca49a (2026-04-03)
    MEM   not found in a source: unverified, shown as such
Rates are dense (no sparsity). Links are one direction per GPU. Datasheet peaks are never
reached: on one H100 SXM a device copy reaches about 3.0 TB/s and an 8192^3 BF16 matmul
798 TFLOP/s; on one H200 about 4.3 TB/s and 769-798 TFLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.formats import MATRIX_RATES

GIB = 1024**3
_T = 1e12
_G = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        name: the key; ``aliases`` are accepted too.
        bf16_flops_per_s, fp8_flops_per_s, fp4_flops_per_s: dense matrix peaks; None where
            the GPU has no such units.
        memory_bytes, memory_bytes_per_s: capacity and peak bandwidth.
        link_bytes_per_s: GPU to GPU inside the scale-up domain, one direction.
        scale_up_gpus: GPUs in one scale-up domain; ``node_gpus``: in one server.
        scale_out_bytes_per_s: per GPU between domains, one direction.
        compute_capability: CUDA's, or the gfx name.
        published_system: this GPU's folder in the published tables, None without one.
        source: where the row is from and what in it is unverified.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    fp4_flops_per_s: float | None
    memory_bytes: int
    memory_bytes_per_s: float
    tdp_w: float
    link_bytes_per_s: float
    scale_up_gpus: int
    node_gpus: int
    scale_out_bytes_per_s: float
    compute_capability: str
    num_sms: int
    published_system: str | None
    source: str

    def matrix_flops_per_s(self, rate: str) -> float:
        """Dense peak at ``rate`` ("bf16", "fp8", "fp4").

        Raises:
            ValueError: an unknown rate, or this GPU has no matrix units of it.
        """
        if rate not in MATRIX_RATES:
            raise ValueError(f"rate: expected one of {', '.join(MATRIX_RATES)}; got {rate!r}")
        peak = getattr(self, f"{rate}_flops_per_s")
        if peak is None:
            raise ValueError(f"gpu: {self.name} has no {rate.upper()} matrix units")
        return peak


def _gpu(
    name: str, title: str, aliases: tuple[str, ...], tflops: tuple[float, float | None, float | None],
    memory: tuple[int, float], tdp_w: float, link: tuple[float, int, int, float],
    chip: tuple[str, int], system: str | None, source: str,
) -> Gpu:  # fmt: skip
    bf16, fp8, fp4 = tflops
    return Gpu(
        name, title, aliases, bf16 * _T, fp8 and fp8 * _T, fp4 and fp4 * _T, memory[0], memory[1] * _T,
        tdp_w, link[0] * _G, link[1], link[2], link[3] * _G, chip[0], chip[1], system, source,
    )  # fmt: skip


# tflops: BF16, FP8, FP4 · memory: bytes, TB/s · link: GB/s, domain, GPUs per server, scale-out GB/s · chip: cc, SMs
_ROWS = (
    _gpu("a100", "A100 80GB SXM", ("a100_sxm",), (312, None, None), (80 * GIB, 2.039), 400,
         (300, 8, 8, 25), ("8.0", 108), "a100_sxm", "AIC"),
    _gpu("l40s", "L40S", (), (362.05, 733, None), (48305799168, 0.864), 350,
         (32, 8, 8, 50), ("8.9", 142), "l40s", "AIC; SM count MEM (unverified)"),
    _gpu("h100", "H100 SXM", ("h100_sxm",), (989, 1979, None), (80 * GIB, 3.35), 700,
         (450, 8, 8, 50), ("9.0", 132), "h100_sxm", "AIC, SPEC"),
    _gpu("h100_pcie", "H100 PCIe", (), (756.5, 1513, None), (80 * GIB, 2.0), 350,
         (64, 8, 8, 50), ("9.0", 114), None, "AIC"),
    _gpu("h200", "H200 SXM", ("h200_sxm",), (989, 1979, None), (141 * GIB, 4.8), 700,
         (450, 8, 8, 50), ("9.0", 132), "h200_sxm", "AIC, SPEC"),
    _gpu("h800", "H800 SXM", ("h800_sxm",), (989, 1979, None), (80 * GIB, 3.35), 700,
         (200, 8, 8, 50), ("9.0", 132), None, "AIC for the H100 it equals; peaks MEM (unverified)"),
    _gpu("h20", "H20", ("h20_sxm",), (148, 296, None), (96 * GIB, 4.0), 400,
         (450, 8, 8, 50), ("9.0", 78), None, "SPEC"),
    _gpu("b200", "B200 SXM", ("b200_sxm",), (2250, 4500, 9000), (180 * GIB, 7.7), 1000,
         (900, 8, 8, 50), ("10.0", 148), "b200_sxm",
         "AIC (7.7 TB/s; SPEC says 8.0; scale-out 400 Gb/s as SPEC, AIC's yaml says 800)"),
    _gpu("b300", "B300 SXM", ("b300_sxm",), (2250, 4500, 13500), (288400343040, 7.75), 1100,
         (900, 8, 8, 100), ("10.3", 148), "b300_sxm",
         "AIC (275040 MiB, 7.75 TB/s, 1100 W; SPEC says 268 GB, 8 TB/s, 1200 W); FP4 SPEC (AIC 14000)"),
    _gpu("gb200", "GB200 NVL72", ("gb200_nvl72",), (2500, 5000, 10000), (198674743296, 8.0), 1200,
         (900, 72, 4, 100), ("10.0", 152), "gb200", "AIC (189471 MiB), SPEC"),
    _gpu("gb300", "GB300 NVL72", ("gb300_nvl72",), (2500, 5000, 15000), (298013687808, 8.0), 1400,
         (900, 72, 4, 100), ("10.3", 152), "gb300", "AIC (284208 MiB), SPEC"),
    _gpu("rtx_pro_6000", "RTX PRO 6000 Server", ("rtx_pro_6000_server",), (468, 936, 1871),
         (102641958912, 1.792), 600, (64, 8, 8, 50), ("12.0", 188), "rtx_pro_6000_server",
         "AIC (peaks at 2430 MHz; scale-out is its placeholder)"),
    _gpu("rtx_5090", "RTX 5090", (), (209, 419, 1676), (32 * GIB, 1.792), 575,
         (64, 8, 8, 50), ("12.0", 170), None, "SPEC; FP4 peak MEM (unverified)"),
    _gpu("mi300x", "MI300X", (), (1307, 2615, None), (192 * GIB, 5.3), 750,
         (448, 8, 8, 50), ("gfx942", 304), None, "SPEC"),
    _gpu("mi355x", "MI355X", (), (2516, 5033, 10066), (288 * GIB, 8.0), 1400,
         (576, 8, 8, 50), ("gfx950", 256), None, "SPEC; gfx name MEM (unverified)"),
)  # fmt: skip

GPUS: dict[str, Gpu] = {row.name: row for row in _ROWS}
_BY_ALIAS = {alias: row for row in _ROWS for alias in (row.name, *row.aliases)}

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GeForce RTX 5090": "rtx_5090",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
}
"""Names as the driver gives them, exactly."""


def get_gpu(name: str) -> Gpu:
    """The GPU with exactly this name or alias (case-insensitive).

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return _BY_ALIAS[name.lower()]
    except KeyError:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}; got {name!r}") from None
