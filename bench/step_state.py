"""A decode step's state: what its launches read, write and share, and their list. Made by ``decode_step.build_step``.

Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..kernels.attention_plan import empty_parts, num_plan_programs, plan_attention
from ..kernels.codec import QuantizedTensor
from ..kernels.mla_attention import choose_mla_tile
from ..kernels.moe_layer import MoeLayer, MoeWorkspace, empty_moe_workspace
from ..kernels.paged_attention import choose_attention_tile
from ..kernels.quantize import empty_quantized
from ..kernels.split_k import arch_of, num_multiprocessors
from . import step_ops as ops
from .deployment import Precision
from .model_config import GqaAttention, MlaAttention, MoeFfn
from .step_model import StepModel
from .step_ops import Attending, Buffers, Place, StepOp
from .step_weights import NVFP4_ACTIVATION_SCALE, LayerWeights

_TILE_VALUES = 128 * 256
"""Most values of a tile of a linear layer's kernel."""

_SPLIT_PROGRAMS = 2
"""Programs per SM up to which its k is split (``split_k.choose_splits``)."""


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}; got {got}")


class DecodeStep:
    """See the module; made by ``build_step``.

    Attributes:
        model, precision, batch, capacity: capacity is the most tokens that a sequence may hold.
        page_table: int32 (B, pages of a sequence). cached: tokens of each sequence before the step.
        token_seed: so that steps with sequences of their own are measured over tokens of their own.
        ops: in the order of their launch.
        layers: for each layer its weights, which other layers may use too. ends: embedding, final_norm, lm_head.
        token_ids, positions, lengths, slots: per sequence: what ``launch`` reads; ``seek`` sets all but the first.
        logits (B, vocab) BF16, next_token (B,) int64: what it writes.
        buffers: all that stands between, by name.
    """

    def __init__(
        self, model: StepModel, precision: Precision, page_table: torch.Tensor, capacity: int, page_size: int
    ) -> None:
        batch, device = page_table.shape[0], page_table.device
        self.model, self.precision, self.batch, self.capacity, self.device = model, precision, batch, capacity, device
        self.page_table, self.page_size = page_table, page_size
        self.cached = [0] * batch
        self.token_seed = 0
        self.ops: list[StepOp] = []
        self.layers: list[LayerWeights] = []
        self.ends: Buffers = {}
        self.buffers: Buffers = {}
        self.operands: dict[str, QuantizedTensor] = {}
        self._workspaces: dict[MoeFfn, MoeWorkspace] = {}
        self._attending: dict[object, Attending] = {}
        vocab = model.config.vocab_size
        self.token_ids = torch.arange(batch, dtype=torch.int64, device=device) % vocab
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = torch.ones(batch, dtype=torch.int32, device=device)
        self.slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.empty(batch, vocab, dtype=torch.bfloat16, device=device)
        self.next_token = torch.empty(batch, dtype=torch.int64, device=device)

    # -- use ---------------------------------------------------------------------------------------

    def launch(self, after: Callable[[StepOp], None] | None = None) -> None:
        """Enqueues one step; ``after`` is called behind each op's launch."""
        for op in self.ops:
            op.run(op.weights)
            if after is not None:
                after(op)

    def launch_with_streams(self) -> list[torch.Tensor]:
        """Launches, and keeps the residual stream (B, h) before the first layer and behind each: layers + 1 of them."""
        streams: list[torch.Tensor] = []

        def keep(op: StepOp) -> None:
            if op.name == "embedding":
                streams.append(op.outputs["y"].clone())
            elif op.name == "final_norm" or (op.name == "attention_norm" and op.layer):
                streams.append(op.outputs["residual"].clone())

        self.launch(keep)
        return streams

    def seek(self, cached: int | Sequence[int]) -> None:
        """Sets how many tokens each sequence has cached before the step: the new one is appended behind them.

        Raises:
            ValueError: another number of sequences, or a length that is negative or fills the capacity.
        """
        lengths = [cached] * self.batch if isinstance(cached, int) else list(cached)
        require(len(lengths) == self.batch, "cached", f"{self.batch} lengths", len(lengths))
        good = all(0 <= length < self.capacity for length in lengths)
        require(good, "cached", f"lengths from 0 to {self.capacity - 1}", lengths)
        self.cached = lengths
        places = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.positions.copy_(places)
        self.lengths.copy_(places + 1)
        page = self.page_table.gather(1, (places // self.page_size)[:, None])[:, 0].long()
        self.slots.copy_(page * self.page_size + places % self.page_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def distinct_layers(self) -> int:
        """Layers that have weights of their own."""
        return len({id(layer) for layer in self.layers})

    @property
    def tokens(self) -> Buffers:
        """Where each sequence's new token stands."""
        return {"positions": self.positions, "slots": self.slots}

    def poison(self) -> None:
        """Fills all that stands between inputs and outputs, and the outputs, with 0xFF bytes: NaN in every float."""
        for part in (*self.buffers.values(), self.logits, self.next_token):
            part.unsqueeze(-1).view(torch.uint8).fill_(0xFF)

    # -- buffers -----------------------------------------------------------------------------------

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The buffer of this name and shape, which layers share."""
        key = "x".join(map(str, (name, *shape)))
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.buffers[key]

    def operand(self, name: str, columns: int, format: str) -> QuantizedTensor:
        """The same of activations (B, columns) in a format; NVFP4's global scale is fixed."""
        key = f"{name}x{columns}x{format}"
        if key not in self.operands:
            made = empty_quantized(format, self.batch, columns, self.device)
            if made.global_scale is not None:
                made.global_scale.fill_(NVFP4_ACTIVATION_SCALE)
            self.operands[key] = made
            self.buffers |= {f"{key}.{part}": tensor for part, tensor in ops.written(made).items()}
        return self.operands[key]

    def workspace(self) -> torch.Tensor:
        """Of linear layers whose k is split."""
        size = _SPLIT_PROGRAMS * num_multiprocessors(self.device) * _TILE_VALUES
        return self.buffer("workspace", size, dtype=torch.float32)

    def attending(self, attention: GqaAttention | MlaAttention) -> Attending:
        """What all layers of this attention share; made with its op when first asked for."""
        if attention not in self._attending:
            kv, window, arch = self.precision.kv, None, arch_of(self.device)
            sizes = {"batch": self.batch, "max_tokens": self.page_table.shape[1] * self.page_size}
            if isinstance(attention, GqaAttention):
                group, window = attention.num_heads // attention.num_kv_heads, attention.window
                sizes |= {"kv_heads": attention.num_kv_heads, "window": window or 0}
                tile = choose_attention_tile(attention.head_dim, kv, group, arch, **sizes)
                columns, width = attention.num_kv_heads * -(-group // tile.block_m), attention.head_dim
            else:
                tile = choose_mla_tile(kv, attention.num_heads, arch, **sizes)
                columns, width = -(-attention.num_heads // tile.block_m), attention.kv_lora_rank
            programs = num_plan_programs(columns, self.device, tile.num_warps)
            plan = plan_attention(self.lengths, programs, tile.block_n, window=window)
            parts = empty_parts(plan, attention.num_heads, width)
            shared = Attending(tile, plan, parts, self.page_table, self.lengths, max(self.cached) + 1)
            name = "attention_plan" if window is None else "window_attention_plan"
            self.ops.append(ops.attention_plan(Place(name), self.lengths, plan))
            self.buffers |= {
                f"{name}.{len(self._attending)}": plan.table,
                f"{name}.o": parts.o,
                f"{name}.lse": parts.lse,
            }
            self._attending[attention] = shared
        return self._attending[attention]

    def moe_workspace(self, ffn: MoeFfn, layer: MoeLayer) -> MoeWorkspace:
        if ffn not in self._workspaces:
            self._workspaces[ffn] = empty_moe_workspace(layer, self.batch, self.device)
        return self._workspaces[ffn]
