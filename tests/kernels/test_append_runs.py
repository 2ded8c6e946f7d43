"""The appends as the bench runs them: no byte is wrong, a wrong one is seen, and how they are compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from recorder import Recorder
from tokenfab.kernels import kv_append, mla_append
from tokenfab.kernels.append_points import COMPILED_ARCHS, MLA_WIDTHS, append_points, append_work
from tokenfab.kernels.append_runs import KvAppend, MlaAppend, grid_matrix, make_cos_sin
from tokenfab.kernels.compile_point import CONSTEXPR, CompilePoint
from tokenfab.kernels.kv_cache import empty_kv_cache, empty_mla_cache
from tokenfab.kernels.kv_layout import KV_FORMATS, MLA_FORMATS, KvLayout, MlaLayout
from tokenfab.kernels.reference import Exact, error
from tokenfab.kernels.registry import Work

GQA = {"num_tokens": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
MLA = {"num_tokens": 16, "num_heads": 2, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 16}
CASES = [
    *(pytest.param(KvAppend, "rope_append", format, GQA, id=f"gqa-{format}") for format in KV_FORMATS),
    *(pytest.param(MlaAppend, "mla_append", format, MLA, id=f"mla-{format}") for format in MLA_FORMATS),
]
POINTS = append_points()
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}


def run(kind: Any, format: str, shape: dict[str, int], device: torch.device) -> tuple[Any, ...]:
    """(weights, activations, output, expected), the output poisoned before the launch."""
    made = kind("", format)
    weights, activations = made.make_weights(shape, 1, device), made.make_activations(shape, 1, device)
    output = made.make_output(shape, device)
    for part in output.values():
        part.view(torch.uint8).fill_(0xA5)
    inputs = [*weights.values(), *activations.values()]
    before = [part.clone() for part in inputs]
    made.launch(weights, activations, output)
    assert all(torch.equal(part, copy) for part, copy in zip(inputs, before, strict=True))
    return weights, activations, output, made.reference(shape, weights, activations)


@pytest.mark.parametrize(("kind", "op", "format", "shape"), CASES)
def test_no_byte_is_wrong_and_a_wrong_one_is_seen(
    kind: Any, op: str, format: str, shape: dict[str, int], device: torch.device
) -> None:
    _, _, output, expected = run(kind, format, shape | {"num_tokens": 5}, device)
    assert error(output, expected) == 0.0
    written = expected.written["pages"]
    assert int(written.sum()) == 5 * written.numel() // 16
    for name, part in output.items():
        raw = part.view(torch.uint8).view(-1)
        counted = written.flatten() if name == "pages" else torch.ones_like(raw, dtype=torch.bool)
        places = counted.nonzero().flatten()
        for place in (places[0], places[len(places) // 2], places[-1]):
            raw[place] ^= 1
            assert error(output, expected) > 0, (name, int(place))
            raw[place] ^= 1
        if name == "pages":  # what no token owns may hold anything
            raw[~counted] ^= 0xFF
    assert error(output, expected) == 0.0


def test_a_scale_or_a_rotation_off_is_seen(device: torch.device) -> None:
    weights, activations, output, expected = run(KvAppend, "fp8", GQA | {"num_tokens": 3}, device)
    made = KvAppend("", "fp8")
    changes = ({"factors": weights["factors"] * 1.2}, {"cos_sin": weights["cos_sin"].roll(1, 0)},
               {"k_norm": weights["q_norm"]})  # fmt: skip
    for change in changes:
        made.launch(weights | change, activations, output)
        assert error(output, expected) > 0.05
    made.launch(weights, activations | {"positions": activations["positions"].flip(0)}, output)
    assert error(output, expected) > 0.05


def test_wrong_buffers_are_refused() -> None:
    expected = Exact({"q": torch.ones(2, 3), "pages": torch.ones(4, dtype=torch.uint8)})
    assert error({"q": torch.ones(2, 3), "pages": torch.ones(4, dtype=torch.uint8)}, expected) == 0
    assert error({"q": torch.ones(2, 3), "pages": torch.zeros(4, dtype=torch.uint8)}, expected) == 4 / 28
    assert error({}, Exact({})) == 0
    for q in (torch.ones(3, 2), torch.ones(2, 3).double()):
        with pytest.raises(ValueError, match=r"^q: expected .*; got "):
            error({"q": q}, expected)


@pytest.mark.parametrize(("kind", "op", "format", "shape"), CASES)
def test_work_is_what_the_buffers_hold(kind: Any, op: str, format: str, shape: dict[str, int]) -> None:
    """All pages full; ones in place of a factor are not read."""
    made, work = kind("", format), append_work(op, format)(shape)
    weights = made.make_weights(shape, 1, "cpu")
    if format not in ("fp8", "nvfp4"):
        assert (weights.pop("factors") == 1).all()
    held = [*made.make_activations(shape, 1, "cpu").values(), *made.make_output(shape, "cpu").values()]
    assert work.weight_bytes == sum(part.nbytes for part in weights.values())
    assert work.activation_bytes == sum(part.nbytes for part in held)
    assert work.flops == 0


def test_work_of_some_shapes() -> None:
    """3 tokens: rows of 8 heads of 64 in, 4 out; K and V of 2 heads; 16 bytes of position and slot."""
    shape = GQA | {"num_tokens": 3}
    written = {"bf16": 512, "fp8": 256, "fp8_row": 256 + 16, "mxfp4": 128 + 8, "nvfp4": 128 + 16}
    for format, size in written.items():
        factors = 8 if format in ("fp8", "nvfp4") else 0
        want = Work(3 * 256 + 256 + factors, 3 * (1024 + 512 + size + 16), 0.0)
        assert append_work("rope_append", format)(shape) == want


@pytest.mark.parametrize(("kind", "op", "format", "shape"), CASES)
def test_inputs_follow_the_seed(kind: Any, op: str, format: str, shape: dict[str, int]) -> None:
    make = kind("", format).make_activations
    first, again, other = make(shape, 1, "cpu"), make(shape, 1, "cpu"), make(shape | {"num_tokens": 40}, 2, "cpu")
    assert all(torch.equal(part, again[name]) for name, part in first.items())
    assert sorted(other["positions"].tolist()) == list(range(40))
    assert len(set(other["slots"].tolist())) == 40
    assert 0 <= min(other["slots"].tolist()) <= max(other["slots"].tolist()) < 48
    assert len({part.data_ptr() for part in first.values()}) == len(first)


def test_squares_of_the_grid_sum_exactly() -> None:
    values = grid_matrix(40, 512, 1, torch.device("cpu")).float()
    assert torch.equal((values * values).sum(1).double(), values.double().square().sum(1))
    assert float(values.abs().max()) == 4.0
    assert 0.9 < float(values.std()) < 1.1


# -- compiled --------------------------------------------------------------------------------------


def test_r18_all_points_compile_without_spills() -> None:
    found = compiled(POINTS, COMPILED_ARCHS)
    assert not [each for each in found if each.problems]
    assert all(each.facts.spill_bytes == 0 and not each.facts.matrix for each in found)
    assert len(found) == len(POINTS) * len(COMPILED_ARCHS) <= 60


def test_every_format_is_compiled() -> None:
    seen = {tuple(point.name.split("/")[:2]) for point in POINTS}
    gqa = {("rope_append", format) for format in KV_FORMATS}
    assert seen == gqa | {("mla_append", format) for format in MLA_FORMATS}
    assert len({point.name for point in POINTS}) == len(POINTS)


def call(point: CompilePoint) -> None:
    """The wrapper, as the point's name says."""
    op, format, size, style, *more = point.name.split("/")
    two = torch.arange(2)
    if op == "rope_append":
        head_dim = int(size[1:])
        weight = torch.ones(head_dim, dtype=torch.bfloat16) if more else None
        cache = empty_kv_cache(KvLayout(format, head_dim, 64), 1, 8, "cpu")
        qkv = torch.ones(2, 80 * head_dim, dtype=torch.bfloat16)
        kv_append.append_kv(
            qkv, two, make_cos_sin(2, head_dim, "cpu"), cache, two, 64, style=style, q_norm=weight, k_norm=weight
        )
        return
    rank, rope_dim = MLA_WIDTHS
    both = torch.ones(2, rank + rope_dim, dtype=torch.bfloat16)
    cache = empty_mla_cache(MlaLayout(format, rank, rope_dim, 64), 1, "cpu")
    options = {} if more else {
        "norm": both[0, :rank],
        "q_rope": torch.ones(2, 128, 192, dtype=torch.bfloat16)[:, :, 128:],
        "q_out": torch.ones(2, 128, 576, dtype=torch.bfloat16)[:, :, 512:],
    }  # fmt: skip
    mla_append.append_mla(
        both[:, :rank], both[:, rank:], two, make_cos_sin(2, rope_dim, "cpu"), cache, two, style=style, **options
    )


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_the_wrappers_launch_what_is_compiled(point: CompilePoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants, warps, options, types, and which numbers Triton specialises."""
    module = kv_append if point.name.startswith("rope") else mla_append
    kernel = Recorder(getattr(module, point.function))
    assert len(kernel.signature.parameters) <= 25
    monkeypatch.setattr(module, point.function, kernel)
    call(point)
    types, constants = dict(point.signature), dict(point.constexprs)
    assert kernel.options == {"num_warps": point.num_warps, **dict(point.options)}
    assert kernel.arguments.keys() == types.keys()
    ones = {name for name, value in kernel.arguments.items() if value is None or (value == 1) is True}
    assert {name for name, kind in types.items() if kind == CONSTEXPR} == constants.keys() >= ones
    for name, value in kernel.arguments.items():
        if name in constants:
            assert value == constants[name], name
        elif isinstance(value, torch.Tensor):
            assert (TYPES[value.dtype], name in point.aligned) == (types[name], True), name
        else:
            expected = ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)
            assert (types[name], name in point.aligned) == expected, name


@pytest.mark.parametrize(("kind", "op", "format", "shape"), CASES)
def test_the_tile_is_that_of_the_launch(kind: Any, op: str, format: str, shape: dict[str, int]) -> None:
    point = next(p for p in POINTS if p.name.startswith(f"{op}/{format}/"))
    sizes = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 128} if op == "rope_append" else {"num_heads": 128}
    tile = kind("", format).tile(shape | sizes, "cpu")
    assert tile == {"block_h": dict(point.constexprs)["BLOCK_H"], "num_warps": point.num_warps}
