"""Row 17, which only a GPU can show: every kernel of the registry in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from tokenfab.kernels.registry import Kernel
from tokenfab.tests.reliability.walk import case_of, copies, each_kernel, parts_of, same

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU; `tokenfab lab` runs it")


@needs_gpu
@each_kernel
def test_r17_graph_replay_after_inputs_change(kernel: Kernel, device: torch.device) -> None:
    """Captured, then replayed on other data in the same buffers: equal in bits to an eager launch on them."""
    case = case_of(kernel, device)
    activations = copies(case.activations)
    output = case.run.make_output(case.shape, device)
    case.run.launch(case.weights, activations, output)  # compiles, and makes its workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run.launch(case.weights, activations, output)
    for name, part in case.run.make_activations(case.shape, 9, device).items():
        activations[name].copy_(part)
    for part in parts_of(output).values():
        part.view(torch.uint8).fill_(0xFF)
    graph.replay()
    torch.cuda.synchronize()
    assert same(parts_of(output), case.launch(activations=activations))
