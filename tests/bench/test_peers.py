"""Other libraries' kernels: skipped with a reason where they are not, right where they are.

No library is needed: a module stands in for each, with its signature, which computes what its documentation says, in
plain torch. Where the layout that an adapter passes is not the documented one, the results differ.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tokenfab.bench import peers
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.peers import ANCHORS, COPY, LIBRARIES, PEERS, Peer, PeerError, absence, fits, version_sources
from tokenfab.bench.summaries import kernel_hash
from tokenfab.bench.targets import absent_peers, find_targets, peers_here, peers_of
from tokenfab.bench.user_check import check_kernel, cpu_device
from tokenfab.kernels.codec import decode_e2m1, unpack_fp4
from tokenfab.kernels.registry import find_kernels

GQA = {"batch": 2, "length": 37, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "window": 0, "q_len": 1,
       "page_size": 16}  # fmt: skip
MLA = {"batch": 2, "length": 100, "num_heads": 3, "kv_lora_rank": 512, "rope_dim": 64, "q_len": 1, "page_size": 64}
MOE = {"num_tokens": 9, "hidden": 192, "inter": 128, "top_k": 2, "num_experts": 8, "ep": 2, "load": 0}
BLOCKED = {"m": 5, "n": 256, "k": 512}


def peer(library: str, weight: str) -> Peer:
    return next(each for each in PEERS if (each.library, each.weight) == (library, weight))


def verdicts(kernel: Peer, *shapes: dict[str, int]) -> list[str]:
    """Of the check that the bench makes before and after timing, on the CPU."""
    assert all(fits(kernel, shape) for shape in shapes)
    return [each.verdict for each in check_kernel(kernel, shapes, cpu_device(), "cpu")]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts modules in a library's place."""

    def put(**modules: Any) -> None:
        for name, parts in modules.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(parts)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, child = module.__name__.rpartition(".")
            if parent in sys.modules:
                monkeypatch.setattr(sys.modules[parent], child, module, raising=False)

    return put


# -- what is here ------------------------------------------------------------------------------------


def test_absent_libraries_are_left_out_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert absence(peer("flashinfer.decode", "fp8")) == (
        "module flashinfer: expected package flashinfer-python; found none"
    )
    assert absence(peer("deep_gemm.fp8_gemm_nt", "fp8_block")) == (
        "module deep_gemm: expected its folder on PYTHONPATH; found none"
    )
    assert [each.name for each in peers_here(find_kernels("attention"))] == ["attention/bf16-bf16@torch.sdpa"]
    assert {t.kernel.name for t in find_targets("mla", None, ["deepseek-v3"], [16], get_gpu("h100"))} == {
        f"mla/{format}-bf16" for format in ("bf16", "fp8", "fp8_row")
    }
    reasons = absent_peers("mla", None, get_gpu("h100"))
    assert set(reasons) == {
        "mla/bf16-bf16@flashinfer.mla", "mla/fp8-bf16@flashinfer.mla", "mla/bf16-bf16@flash_mla.with_kvcache"
    }  # fmt: skip
    assert absent_peers("gemm", ["mxfp4-bf16"], get_gpu("h100")) == {}


def test_another_package_of_the_same_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    monkeypatch.setattr(peers.importlib.metadata, "version", version)
    assert absence(peer("flash_mla.with_kvcache", "bf16")) == (
        "module flash_mla: expected that of package sgl-flash-mla; found another's"
    )


def test_a_gpu_without_a_kernel_is_a_reason_too() -> None:
    scaled = peer("torch._scaled_mm", "fp8_block")
    assert absence(scaled, 90) == ""
    assert absence(scaled, 100) == "expected compute capability 9.0; got 10.0"
    assert absence(ANCHORS[1], 80) == "expected compute capability 8.9 or later; got 8.0"
    assert absence(find_kernels("gemm", ["nvfp4-nvfp4"])[0], 80) == ""  # the registry's own are chosen elsewhere
    names = {t.kernel.name for t in find_targets("gemm", ["fp8_block"], ["deepseek-v3"], [64], get_gpu("b200"))}
    assert scaled.name not in names
    assert scaled.name in absent_peers("gemm", ["fp8_block"], get_gpu("b200"))


def test_nothing_is_imported_before_it_is_needed() -> None:
    modules = {library.module for library in LIBRARIES.values()} | {"triton"}
    code = (
        "import sys; from tokenfab.bench.gpus import get_gpu; from tokenfab.bench import targets;"
        "targets.find_targets(None, None, ['deepseek-v3'], [64], get_gpu('h100'), [1024]);"
        "targets.absent_peers(None, None, get_gpu('h100'));"
        f"print({sorted(modules)} and set({sorted(modules)}) & set(sys.modules) - {{'torch'}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_librarys_own_version_names_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"flashinfer-python": "0.6.18.post1", "torchao": "0.18.0"}
    peers._version.cache_clear()
    monkeypatch.setattr(peers.importlib.metadata, "version", versions.__getitem__)
    decode, torchao = peer("flashinfer.decode", "bf16"), peer("torchao.blockwise_fp8_gemm", "fp8_block")
    properties: Any = SimpleNamespace(torch="2.11")
    assert version_sources(decode, "2.11") == {"flashinfer-python": "0.6.18.post1"}
    assert version_sources(torchao, "2.11") == {"torchao": "0.18.0"}
    assert version_sources(COPY, "2.11") == {"torch": "2.11"}
    assert version_sources(find_kernels("gemm")[0], "2.11") == {}
    before = kernel_hash(decode, properties)
    assert kernel_hash(decode, SimpleNamespace(torch="2.12")) == before  # type: ignore[arg-type]
    versions["flashinfer-python"] = "0.6.19"
    peers._version.cache_clear()
    assert kernel_hash(decode, properties) != before
    # a folder has no version but its files
    folder = tmp_path / "deep_gemm"
    folder.mkdir()
    (folder / "__init__.py").write_text("x = 1")
    found = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: found)
    deep = peer("deep_gemm.fp8_gemm_nt", "fp8_block")
    (first,) = version_sources(deep, "2.11").values()
    (folder / "kernel.so").write_bytes(b"other")
    peers._version.cache_clear()
    assert version_sources(deep, "2.11") != {"deep_gemm": first}
    peers._version.cache_clear()


def test_rows_are_whole() -> None:
    names = [each.name for each in PEERS]
    assert len(set(names)) == len(names)
    for each in PEERS:
        assert each.package in LIBRARIES.values()
        assert all(each.source_texts().values())
        assert each in peers_of(find_kernels(each.op))
    # first of their kind, so that nothing but torch is ever beside a block
    assert PEERS[: len(ANCHORS)] == ANCHORS
    assert {each.package.module for each in ANCHORS} == {"torch"}


def test_a_library_that_fails_stops_no_other(install: Any, device: torch.device) -> None:
    def flash_attn_with_kvcache(*args: Any, **options: Any) -> torch.Tensor:
        raise AssertionError("head dim 64 is not compiled")

    install(fa3_fwd_interface={"flash_attn_with_kvcache": flash_attn_with_kvcache})
    kernel = peer("fa3.with_kvcache", "bf16")
    run = kernel.load()
    with pytest.raises(PeerError, match=r"^attention/bf16-bf16@fa3.with_kvcache: launch: AssertionError: head dim 64"):
        run.launch(run.make_weights(GQA, 0, "cpu"), run.make_activations(GQA, 0, "cpu"), run.make_output(GQA, "cpu"))
    (verdict,) = verdicts(kernel, GQA)
    assert verdict.startswith("attention/bf16-bf16@fa3.with_kvcache: launch: AssertionError")
    install(fa3_fwd_interface={})
    with pytest.raises(PeerError, match="import: ImportError: cannot import name"):
        kernel.load()
    out_of_memory = dataclasses.replace(kernel, runnable="..tests.bench.test_peers:NoMemory")
    with pytest.raises(torch.OutOfMemoryError):  # the campaign's to explain
        out_of_memory.load()


class NoMemory:
    def __init__(self, *formats: str) -> None:
        raise torch.OutOfMemoryError("none left")


# -- matmuls -----------------------------------------------------------------------------------------


def block_product(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Of scales (m, k / 128) and (n / 128, k / 128)."""
    wide = w_scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    return ((x.double() * x_scale.repeat_interleave(128, 1)[:, : x.shape[1]]) @ (w.double() * wide).T).bfloat16()


def test_torch_gets_scales_per_block_as_cublas_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ScaledBlas.cpp checks: x's scales outer-dim-major, the weight's contiguous in its own order."""

    def scaled_mm(x: Any, w: Any, x_scale: Any, w_scale: Any, *, out_dtype: Any, out: torch.Tensor) -> None:
        (m, k), n = x.shape, w.shape[1]
        assert (x.stride(), w.stride()) == ((k, 1), (1, k))
        assert (tuple(x_scale.shape), x_scale.stride()) == ((m, k // 128), (1, m))
        assert (tuple(w_scale.shape), w_scale.t().stride()) == ((k // 128, n // 128), (k // 128, 1))
        assert out_dtype == out.dtype == torch.bfloat16
        out.copy_(block_product(x, x_scale, w.t(), w_scale.t()))

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    kernel = peer("torch._scaled_mm", "fp8_block")
    assert verdicts(kernel, BLOCKED) == ["ok"]
    assert not fits(kernel, BLOCKED | {"k": 384})
    assert not fits(kernel, BLOCKED | {"n": 192})


def test_torch_itself_accepts_the_shapes_of_the_scales() -> None:
    kernel, run = peer("torch._scaled_mm", "fp8_block"), peer("torch._scaled_mm", "fp8_block").load()
    w, x = (
        {name: part.to("meta") for name, part in made.items()}
        for made in (run.make_weights(BLOCKED, 0, "cpu"), run.make_activations(BLOCKED, 0, "cpu"))
    )
    made = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x["data"], w["data"].t(), x["scale"], w["scale"].t(), out_dtype=torch.bfloat16
    )
    assert made.shape == (BLOCKED["m"], BLOCKED["n"])
    assert kernel.archs == (90,)


def test_deep_gemm_gets_aligned_scales(install: Any) -> None:
    def align(scale: torch.Tensor) -> torch.Tensor:
        """(m, k / 128) with strides (1, m rounded up to 16 bytes), as ``get_mn_major_tma_aligned_tensor``."""
        rows, columns = scale.shape
        held = torch.zeros(columns, -(-rows // 4) * 4)
        held[:, :rows] = scale.t()
        return held.t()[:rows]

    def fp8_gemm_nt(a: Any, b: Any, d: torch.Tensor, c: Any = None, recipe: Any = None, **options: Any) -> None:
        assert recipe == (1, 128, 128)
        assert c is None
        assert not options
        assert a[1].stride() == (1, -(-a[0].shape[0] // 4) * 4)
        assert b[1].is_contiguous()
        d.copy_(block_product(*a, *b))

    install(deep_gemm={"fp8_gemm_nt": fp8_gemm_nt, "get_mn_major_tma_aligned_tensor": align})
    assert verdicts(peer("deep_gemm.fp8_gemm_nt", "fp8_block"), BLOCKED, BLOCKED | {"m": 64}) == ["ok", "ok"]


def test_torchaos_kernel_computes_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own Triton kernel, on the interpreter; the first of its tiles, since nothing can be tuned there."""
    library = pytest.importorskip("torchao.kernel.blockwise_quantization")
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn.run(*args, **options, BLOCK_SIZE_M=16, BLOCK_SIZE_N=32)

    monkeypatch.setattr(Autotuner, "run", run)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)  # false without a GPU
    made = library._build_triton_impls()
    monkeypatch.setattr(library, "_get_triton_impls", lambda: made)
    kernel = peer("torchao.blockwise_fp8_gemm", "fp8_block")
    assert verdicts(kernel, {"m": 3, "n": 160, "k": 256}, {"m": 17, "n": 136, "k": 384}) == ["ok", "ok"]


# -- experts -----------------------------------------------------------------------------------------


def test_grouped_mm_is_a_whole_expert_layer() -> None:
    """torch's own, which the CPU has too: two ranks, and an expert that no token chose."""
    kernel = peer("torch.grouped_mm", "bf16")
    assert verdicts(kernel, MOE, MOE | {"ep": 1}, MOE | {"num_tokens": 1, "load": 120}) == ["ok"] * 3


def test_scaled_grouped_mm_gets_rows_and_columns_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_grouped_mm(
        a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, recipe_a: Any, scale_b: torch.Tensor, recipe_b: Any,
        *, offs: torch.Tensor, output_dtype: Any, use_fast_accum: bool,
    ) -> torch.Tensor:  # fmt: skip
        (rows, k), (groups, _, n) = a.shape, b.shape
        assert recipe_a == recipe_b == torch.nn.functional.ScalingType.RowWise
        assert a.is_contiguous()
        assert b.stride() == (k * n, 1, k)
        assert (tuple(scale_a.shape), tuple(scale_b.shape), scale_b.stride(-1)) == ((rows,), (groups, n), 1)
        assert (offs.dtype, tuple(offs.shape)) == (torch.int32, (groups,))
        made = torch.full((rows, n), float("nan"), dtype=output_dtype)
        start = 0
        for group, end in enumerate(offs.tolist()):
            x = a[start:end].double() * scale_a[start:end, None]
            made[start:end] = (x @ (b[group].double() * scale_b[group])).to(output_dtype)
            start = end
        return made

    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", scaled_grouped_mm)
    assert verdicts(peer("torch.scaled_grouped_mm", "fp8_row"), MOE, MOE | {"ep": 1}) == ["ok", "ok"]
    assert not fits(peer("torch.scaled_grouped_mm", "fp8_row"), MOE | {"inter": 100})


class Laid:
    """A library's tensor: bytes in some layout, beside what they are."""

    def __init__(self, storage: Any, dtype: Any = None, shape: Any = None) -> None:
        self.storage, self.dtype, self.shape = storage, dtype, shape


def reverse(tensor: Laid, layout: str, **options: Any) -> Laid:
    """A layout that no reader could mistake for another: back to front."""
    data = tensor.storage.data.flip(-1)
    return Laid(SimpleNamespace(data=data, layout=(layout, tuple(options.items()))), tensor.dtype, tensor.shape)


def wrap(data: torch.Tensor, dtype: Any = None) -> Laid:
    """Two FP4 to a byte along the axis whose stride is 1."""
    shape = list(data.shape)
    shape[data.stride().index(1)] *= 2 if dtype == "fp4" else 1
    return Laid(SimpleNamespace(data=data, layout=None), dtype or data.dtype, shape)


def read_experts(w: Any, scales: Any) -> torch.Tensor:
    """(experts, K, N) in float64."""
    if isinstance(w, torch.Tensor):
        return w.double()
    assert w.storage.layout == ("value", (("mx_axis", 1),))
    assert scales.storage.layout == ("scale", (("num_warps", 8),))
    codes = unpack_fp4(w.storage.data.flip(-1).transpose(-2, -1).contiguous())
    assert list(w.shape) == [codes.shape[0], codes.shape[2], codes.shape[1]]
    each = torch.exp2(scales.storage.data.flip(-1).transpose(-2, -1).double() - 127)
    each = each.repeat_interleave(32, dim=-1)[:, :, : codes.shape[2]]
    return (decode_e2m1(codes).double() * each).transpose(-2, -1)


def route(logits: torch.Tensor, n_expts_act: int) -> tuple[Any, Any, Any]:
    chosen, ids = logits.topk(n_expts_act, dim=1)
    order = ids.flatten().argsort(stable=True)
    data = SimpleNamespace(
        gate_scal=chosen.softmax(dim=1).flatten()[order], hist=ids.flatten().bincount(minlength=logits.shape[1]),
        n_expts_act=n_expts_act,
    )  # fmt: skip
    return data, ("gather", order), ("scatter", order)


def ogs(
    x: torch.Tensor, w: Any, bias: None, routing_data: Any, gather_indx: Any = None, scatter_indx: Any = None,
    precision_config: Any = None, gammas: Any = None, y: Any = None,
) -> torch.Tensor:  # fmt: skip
    """As ``matmul_ogs_torch`` of the library: rows by expert; gathered before, or scattered and summed after."""
    experts = read_experts(w, None if precision_config is None else precision_config.weight_scale)
    rows = x if gather_indx is None else x[gather_indx[1] // routing_data.n_expts_act]
    made, start = torch.empty(rows.shape[0], experts.shape[2], dtype=torch.float64), 0
    for expert, count in enumerate(routing_data.hist.tolist()):
        made[start : start + count] = rows[start : start + count].double() @ experts[expert]
        start += count
    made = made if gammas is None else made * gammas[:, None]
    if scatter_indx is None:
        assert y is None
        return made.bfloat16()
    out = torch.zeros(rows.shape[0] // routing_data.n_expts_act, made.shape[1], dtype=torch.float64)
    out.index_add_(0, scatter_indx[1] // routing_data.n_expts_act, made)
    assert y.shape == (1, *out.shape)
    return y[0].copy_(out)


@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_triton_kernels_gets_experts_in_its_own_layout(install: Any, format: str) -> None:
    fixed: list[dict[str, int]] = []
    layouts = {
        "make_default_matmul_mxfp4_w_layout": lambda mx_axis: ("value", {"mx_axis": mx_axis}),
        "make_default_matmul_mxfp4_w_scale_layout": lambda mx_axis, num_warps: ("scale", {"num_warps": num_warps}),
    }
    install(
        triton_kernels={},
        triton_kernels__routing={"routing": route},
        triton_kernels__matmul_ogs={"matmul_ogs": ogs, "PrecisionConfig": SimpleNamespace},
        triton_kernels__matmul_ogs_details={},
        triton_kernels__matmul_ogs_details__opt_flags={"update_opt_flags_constraints": fixed.append},
        triton_kernels__tensor={
            "FP4": "fp4", "Tensor": Laid, "convert_layout": reverse, "wrap_torch_tensor": wrap,
            "Storage": lambda data, layout: SimpleNamespace(data=data, layout=layout),
        },
        triton_kernels__tensor_details={"layout": SimpleNamespace(**layouts)},
    )  # fmt: skip
    kernel = peer("triton_kernels.matmul_ogs", format)
    alone = MOE | {"ep": 1}
    assert verdicts(kernel, alone, alone | {"hidden": 288, "num_tokens": 1}) == ["ok", "ok"]
    assert fixed == ([{"split_k": 1}] * len(fixed) if format == "mxfp4" else [])
    assert not fits(kernel, MOE)


# -- attention ---------------------------------------------------------------------------------------


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, first: int, end: int) -> torch.Tensor:
    """q (heads, D) over tokens first to end of k (tokens, KV heads, D) and v."""
    group = q.shape[0] // k.shape[1]
    k, v = (part[first:end].double().repeat_interleave(group, 1) for part in (k, v))
    p = torch.softmax(torch.einsum("hd,nhd->hn", q.double(), k) * scale, dim=1)
    return torch.einsum("hn,nhd->hd", p, v)


def test_flash_attention_3_gets_pages_token_by_token(install: Any) -> None:
    def flash_attn_with_kvcache(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any = None, v: Any = None, *,
        cache_seqlens: torch.Tensor, page_table: torch.Tensor, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        assert q.dim() == 4  # (batch, tokens, heads, D)
        assert k_cache.shape[1:] == (GQA["page_size"], GQA["num_kv_heads"], GQA["head_dim"])
        assert page_table.dtype == cache_seqlens.dtype == torch.int32
        made = torch.empty_like(q)
        for b, length in enumerate(cache_seqlens.tolist()):
            keys, values = (part[page_table[b].long()].flatten(0, 1) for part in (k_cache, v_cache))
            for i in range(q.shape[1]):
                place = i + length - q.shape[1]
                first = max(0, place - window_size[0]) if window_size[0] >= 0 else 0
                end = place + 1 if causal else length
                made[b, i] = attend(q[b, i], keys, values, q.shape[-1] ** -0.5, first, end).bfloat16()
        return made

    install(fa3_fwd_interface={"flash_attn_with_kvcache": flash_attn_with_kvcache})
    kernel = peer("fa3.with_kvcache", "bf16")
    assert verdicts(kernel, GQA, GQA | {"q_len": 3}, GQA | {"window": 20, "q_len": 2}) == ["ok"] * 3


class Decode:
    """``BatchDecodeWithPagedKVCacheWrapper`` with CUDA graphs: it reads its own buffers, which ``plan`` fills."""

    num_plans = 0

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Any = None, paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        assert (kv_layout, use_cuda_graph, float_workspace_buffer.nbytes) == ("HND", True, 128 << 20)
        self.use_tensor_cores = use_tensor_cores
        self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int, q_data_type: Any, kv_data_type: Any,
        o_data_type: Any,
    ) -> None:  # fmt: skip
        for buffer, given in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert buffer.dtype == given.dtype == torch.int32
            buffer.copy_(given)
        assert self.use_tensor_cores == (num_qo_heads > 4 * num_kv_heads)
        assert q_data_type == o_data_type == torch.bfloat16
        self.sizes, self.window_left, self.kv = (num_kv_heads, page_size, head_dim), window_left, kv_data_type
        Decode.num_plans += 1

    def run(
        self, q: torch.Tensor, caches: Any, *, out: torch.Tensor, k_scale: float = 1.0, v_scale: float = 1.0
    ) -> None:
        starts, indices, last = self.buffers
        assert all(part.shape[1:] == self.sizes and part.dtype == self.kv for part in caches)
        for b in range(len(last)):
            pages = indices[starts[b] : starts[b + 1]].long()
            length = (len(pages) - 1) * self.sizes[1] + int(last[b])
            k, v = (part[pages].float().transpose(1, 2).flatten(0, 1) for part in caches)
            first = max(0, length - 1 - self.window_left) if self.window_left >= 0 else 0
            out[b] = attend(q[b], k * k_scale, v * v_scale, q.shape[-1] ** -0.5, first, length).bfloat16()


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_flashinfer_gets_pages_head_by_head(install: Any, format: str) -> None:
    install(flashinfer={"BatchDecodeWithPagedKVCacheWrapper": Decode})
    kernel = peer("flashinfer.decode", format)
    Decode.num_plans = 0
    shapes = GQA, GQA | {"window": 20}, GQA | {"num_heads": 10, "length": 48}
    assert verdicts(kernel, *shapes) == ["ok"] * 3
    assert Decode.num_plans == 3  # one per shape: a step plans once for its layers
    assert not fits(kernel, GQA | {"q_len": 2})


class Latent:
    """``BatchMLAPagedAttentionWrapper`` with CUDA graphs."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, use_cuda_graph: bool = False, qo_indptr: Any = None,
        kv_indptr: Any = None, kv_indices: Any = None, kv_len_arr: Any = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        assert use_cuda_graph
        self.buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    def plan(
        self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, num_heads: int, head_dim_ckv: int,
        head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        for buffer, given in zip(self.buffers, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True):
            buffer.copy_(given)
        assert (head_dim_ckv, head_dim_kpe, q_data_type) == (512, 64, torch.bfloat16)
        self.page_size, self.causal, self.scale, self.kv = page_size, causal, sm_scale, kv_data_type

    def run(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor, *,
        out: torch.Tensor, ckv_scale: float = 1.0, kpe_scale: float = 1.0,
    ) -> None:  # fmt: skip
        assert (ckv_cache.shape[1:], kpe_cache.shape[1:]) == ((self.page_size, 512), (self.page_size, 64))
        assert ckv_cache.dtype == kpe_cache.dtype == self.kv
        rows, starts, indices, lengths = self.buffers
        for b, length in enumerate(lengths.tolist()):
            pages = indices[starts[b] : starts[b + 1]].long()
            c = ckv_cache[pages].flatten(0, 1).double()[:length] * ckv_scale
            keys = torch.cat((c, kpe_cache[pages].flatten(0, 1).double()[:length] * kpe_scale), dim=1)
            tokens = range(int(rows[b]), int(rows[b + 1]))
            for row in tokens:
                end = length - (tokens[-1] - row) if self.causal else length
                q = torch.cat((q_nope[row], q_pe[row]), dim=1).double()
                p = torch.softmax(q @ keys[:end].T * self.scale, dim=1)
                out[row] = (p @ c[:end]).bfloat16()


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_flashinfer_mla_gets_latents_and_rope_apart(install: Any, format: str) -> None:
    install(flashinfer={}, flashinfer__mla={"BatchMLAPagedAttentionWrapper": Latent})
    kernel = peer("flashinfer.mla", format)
    assert verdicts(kernel, MLA, MLA | {"q_len": 3, "page_size": 32}) == ["ok", "ok"]
    assert kernel.archs == ((90,) if format == "fp8" else ())
    assert not fits(kernel, MLA | {"kv_lora_rank": 256})


def test_flash_mla_gets_one_cache_of_latents(install: Any) -> None:
    def flash_mla_with_kvcache(
        q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
        head_dim_v: int, tile_scheduler_metadata: list[str], num_splits: None = None,
        softmax_scale: float | None = None, causal: bool = False, is_fp8_kvcache: bool | None = None,
        *, use_legacy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert (k_cache.shape[1:], use_legacy, is_fp8_kvcache) == ((64, 1, 576), True, False)
        assert softmax_scale is not None
        made.append(tile_scheduler_metadata)
        out = torch.empty(*q.shape[:3], head_dim_v, dtype=q.dtype)
        for b, length in enumerate(cache_seqlens.tolist()):
            keys = k_cache[block_table[b].long()].flatten(0, 1)[:, 0]
            for i in range(q.shape[1]):
                end = length - q.shape[1] + 1 + i if causal else length
                p = torch.softmax(q[b, i].double() @ keys[:end].double().T * softmax_scale, dim=1)
                out[b, i] = (p @ keys[:end, :head_dim_v].double()).bfloat16()
        return out, torch.empty(0)

    made: list[list[str]] = []
    install(flash_mla={"flash_mla_with_kvcache": flash_mla_with_kvcache, "get_mla_metadata": lambda: ([], None)})
    kernel = peer("flash_mla.with_kvcache", "bf16")
    assert verdicts(kernel, MLA, MLA | {"q_len": 2}) == ["ok", "ok"]
    assert len({id(schedule) for schedule in made}) == 2  # made once per shape, as a step's layers share it
    assert not fits(kernel, MLA | {"page_size": 16})
