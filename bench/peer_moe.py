"""Other libraries' grouped matmuls as an expert layer: routing, two grouped matmuls, SwiGLU between them, combine.

The same inputs as of ``moe_runs.MoeRun``. Gate and up are rounded to BF16 between the launches, and so they are in the
reference, which is otherwise that of tokenfab's layers. What is no matmul and not the library's own is eager torch: no
stack would serve so, but a reader sees the matmuls with all that they need around them.

Source: ``torch.nn.functional.grouped_mm`` and ``scaled_grouped_mm`` (2.11): int32 ends of the groups on the device,
rows behind the last end left alone; row-wise FP8 wants scales (rows,) and (experts, columns), and weights column-major.
triton_kernels as vLLM 0.33 ships it (``matmul_ogs``, ``routing``; how vLLM lays out MXFP4 weights and which options it
fixes on sm_90).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..kernels.codec import dequantize, quantize
from ..kernels.moe_reference import combine_ref
from ..kernels.moe_runs import Buffers, MoeRun
from ..kernels.moe_work import local_experts
from ..kernels.registry import Shape
from ..kernels.routing_reference import route_ref
from ..kernels.routing_rule import Routing

_MAX, _LEAST = 448.0, 1e-12
"""Of E4M3; of a row's largest magnitude, as ``formats.FP8_ROW``."""


class _SplitExperts(MoeRun):
    """A layer whose gate and up go through memory in BF16."""

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        x, logits, top_k = activations["x"], activations["logits"], shape["top_k"]
        seed, is_exact = weights["origin"].tolist()
        ids, routing = route_ref(logits.cpu(), Routing(shape["num_experts"], top_k))
        ids, routing = ids.to(x.device).flatten(), routing.to(x.device).flatten()
        values = self._rounded(x)
        rows = torch.full((ids.numel(), shape["hidden"]), float("nan"), dtype=torch.float64, device=x.device)
        for expert in range(local_experts(shape)):
            mine = (ids == expert).nonzero().flatten()
            if not mine.numel():
                continue
            upper, lower = (
                dequantize(self._expert(shape, is_gated, expert, seed, x.device, bool(is_exact))).double()
                for is_gated in (True, False)
            )
            gate, up = (values[mine // top_k] @ upper.T).bfloat16().float().chunk(2, dim=1)
            h = (functional.silu(gate) * up).bfloat16()
            rows[mine] = (self._rounded(h) @ lower.T).bfloat16().double() * routing[mine, None]
        return combine_ref(rows, top_k)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() if self.activation == "bf16" else dequantize(quantize(x, self.activation)).double()

    def tile(self, shape: Shape, device: object) -> dict[str, int]:
        return {}


class TorchGroupedExperts(_SplitExperts):
    """``grouped_mm`` of BF16, or ``scaled_grouped_mm`` of FP8 with a scale per row, of which h is quantized anew.

    Rows are sorted by expert, this rank's experts first; those behind the last end count nothing.
    """

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x, logits = activations["x"], activations["logits"]
        top_k = int(activations["sizes"][1])
        num_local = weights["gate_up.data"].shape[0]
        chosen, ids = logits.topk(top_k, dim=1)
        ids, order = ids.flatten().sort(stable=True)
        experts = torch.arange(1, num_local + 1, device=x.device)
        ends = torch.searchsorted(ids, experts).to(torch.int32)
        gate, up = self._matmul(x[order // top_k], "gate_up", weights, ends).float().chunk(2, dim=1)
        h = (functional.silu(gate) * up).to(torch.bfloat16)
        y = self._matmul(h, "down", weights, ends).float() * chosen.softmax(dim=1).flatten()[order, None]
        rows = torch.empty_like(y)
        rows[order] = y.masked_fill((ids >= num_local)[:, None], 0.0)
        output.copy_(rows.view(*output.shape[:1], top_k, -1).sum(dim=1))

    def _matmul(self, x: torch.Tensor, name: str, weights: Buffers, ends: torch.Tensor) -> torch.Tensor:
        w = weights[f"{name}.data"].transpose(-2, -1)
        if self.activation == "bf16":
            return functional.grouped_mm(x, w, offs=ends)
        scale = x.float().abs().amax(dim=1, keepdim=True).clamp(min=_LEAST) / _MAX
        codes = (x.float() / scale).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)
        row_wise = functional.ScalingType.RowWise
        return functional.scaled_grouped_mm(  # pyright: ignore[reportAttributeAccessIssue]
            codes, w, scale.flatten(), row_wise, weights[f"{name}.scale"].flatten(1), row_wise, offs=ends,
            output_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip


class TritonKernelsExperts(_SplitExperts):
    """``matmul_ogs`` with the library's own routing, gather and scatter; weights (experts, K, N) BF16, or MXFP4 in the
    layout that the library chooses for the GPU."""

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        import triton_kernels.matmul_ogs  # pyright: ignore[reportMissingImports]
        import triton_kernels.matmul_ogs_details.opt_flags  # pyright: ignore[reportMissingImports]
        import triton_kernels.routing  # pyright: ignore[reportMissingImports]
        import triton_kernels.tensor  # pyright: ignore[reportMissingImports]
        from triton_kernels.tensor_details import layout  # pyright: ignore[reportMissingImports]

        self._ogs, self._routing = triton_kernels.matmul_ogs, triton_kernels.routing
        self._tensor, self._layout = triton_kernels.tensor, layout
        self._kinds: dict[str, tuple[Any, Any, list[int]]] = {}
        if weight == "mxfp4":  # as vLLM fixes it on sm_90
            triton_kernels.matmul_ogs_details.opt_flags.update_opt_flags_constraints({"split_k": 1})

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made: Buffers = {"origin": torch.tensor([seed, is_exact])}
        for is_gated, name in ((True, "gate_up"), (False, "down")):
            stored = [
                self._expert(shape, is_gated, expert, seed, device, is_exact) for expert in range(local_experts(shape))
            ]
            data = torch.stack([each.data for each in stored]).transpose(-2, -1)
            if self.weight == "bf16":
                made[f"{name}.data"] = data.contiguous()
                continue
            scale = torch.stack([each.scale for each in stored if each.scale is not None])
            scale = functional.pad(scale, (0, -scale.shape[-1] % 4)).transpose(-2, -1)
            made[f"{name}.data"] = self._lay_out(
                f"{name}.data", self._tensor.wrap_torch_tensor(data, dtype=self._tensor.FP4),
                *self._layout.make_default_matmul_mxfp4_w_layout(mx_axis=1),
            )  # fmt: skip
            made[f"{name}.scale"] = self._lay_out(
                f"{name}.scale", self._tensor.wrap_torch_tensor(scale),
                *self._layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8),
            )  # fmt: skip
        return made

    def _lay_out(self, name: str, tensor: Any, layout: Any, options: dict[str, Any]) -> torch.Tensor:
        """The library's tensor in its layout, as the bytes alone; what else it knows is the same for every seed."""
        laid = self._tensor.convert_layout(tensor, layout, **options)
        self._kinds[name] = (laid.storage.layout, laid.dtype, list(laid.shape))
        return laid.storage.data

    def _weight(self, weights: Buffers, name: str) -> Any:
        layout, dtype, shape = self._kinds[name]
        return self._tensor.Tensor(self._tensor.Storage(weights[name], layout), dtype=dtype, shape=list(shape))

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        top_k = int(activations["sizes"][1])
        routing, gather, scatter = self._routing.routing(activations["logits"], top_k)
        gate_up = self._matmul(activations["x"], "gate_up", weights, routing, gather_indx=gather)
        gate, up = gate_up.view(-1, gate_up.shape[-1]).float().chunk(2, dim=1)
        h = (functional.silu(gate) * up).to(torch.bfloat16)
        self._matmul(h, "down", weights, routing, scatter_indx=scatter, gammas=routing.gate_scal, y=output[None])

    def _matmul(self, x: torch.Tensor, name: str, weights: Buffers, routing: Any, **options: Any) -> torch.Tensor:
        if self.weight == "bf16":
            return self._ogs.matmul_ogs(x, weights[f"{name}.data"], None, routing, **options)
        scales = self._ogs.PrecisionConfig(weight_scale=self._weight(weights, f"{name}.scale"))
        w = self._weight(weights, f"{name}.data")
        return self._ogs.matmul_ogs(x, w, None, routing, precision_config=scales, **options)
