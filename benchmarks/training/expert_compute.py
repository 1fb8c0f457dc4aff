"""Four ways to compute sum over a of weights[n, a] * expert[ids[n, a]](x[n]), all differentiable.

| name    | does                                                         | use it when                        |
| ------- | ------------------------------------------------------------ | ---------------------------------- |
| loop    | one product per expert; the reference                        | on the CPU                         |
| dense   | every expert on every token, unchosen ones weighted 0        | experts are tiny                   |
| padded  | experts' tokens in equal buffers; tokens beyond twice the mean load are dropped | nothing better runs |
| grouped | tokens sorted by expert, one grouped product                 | a recent GPU                       |

Rows are gathered by index_select, whose gradient is an addition; that of x[rows] would sort first.

Legend: N tokens, E experts, A experts per token, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CAPACITY = 2.0  # buffer of the padded way, in mean loads
ALIGNMENT = 8  # rows of a group of the grouped product: 16 bytes of bfloat16
_grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm  # public since torch 2.10


def loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        rows, column = (ids == expert).nonzero(as_tuple=True)
        answers = F.linear(_activate(F.linear(x[rows], gate_up[expert])), down[expert])
        output = output.index_add(0, rows, answers * weights[rows, column, None])
    return output


def dense(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    num_experts, dim, size = down.shape
    hidden = F.linear(x, gate_up.flatten(0, 1)).unflatten(1, (num_experts, 2 * size))  # [N, E, 2F]
    share = torch.zeros(x.shape[0], num_experts, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
    hidden = _activate(hidden) * share[:, :, None].to(hidden.dtype)
    return F.linear(hidden.flatten(1), down.transpose(0, 1).reshape(dim, -1))


def padded(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    num_experts, num_pairs = gate_up.shape[0], ids.numel()
    capacity = int(CAPACITY * num_pairs / num_experts) + 1
    order, expert_of, rank = _sorted_pairs(ids, num_experts)
    slot = torch.where(rank < capacity, expert_of * capacity + rank, num_experts * capacity)
    token_of = order // ids.shape[1]
    buffer = x.new_zeros(num_experts * capacity + 1, x.shape[1]).index_copy(0, slot, x.index_select(0, token_of))
    inputs = buffer[:-1].unflatten(0, (num_experts, capacity))
    answers = _activate(inputs @ gate_up.mT.to(x.dtype)) @ down.mT.to(x.dtype)
    answers = torch.cat((answers.flatten(0, 1), x.new_zeros(1, x.shape[1]))).index_select(0, slot)
    return torch.zeros_like(x).index_add(0, token_of, answers * weights.flatten()[order, None])


def grouped(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    num_experts, num_pairs = gate_up.shape[0], ids.numel()
    order, expert_of, rank = _sorted_pairs(ids, num_experts)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device).scatter_add_(
        0, expert_of, torch.ones_like(expert_of)
    )
    room = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    ends = room.cumsum(0)
    slot = (ends - room)[expert_of] + rank
    token_of = order // ids.shape[1]
    num_rows = -(-num_pairs // ALIGNMENT) * ALIGNMENT + num_experts * ALIGNMENT
    inputs = torch.zeros(num_rows, x.shape[1], dtype=torch.bfloat16, device=x.device)
    inputs = inputs.index_copy(0, slot, x.index_select(0, token_of).to(torch.bfloat16))
    offsets = ends.to(torch.int32)
    offsets[-1] = num_rows  # the last group takes the rest of the buffer, all zeros
    hidden = _activate(_grouped_mm(inputs, gate_up.to(torch.bfloat16).mT, offs=offsets))
    answers = _grouped_mm(hidden, down.to(torch.bfloat16).mT, offs=offsets)
    answers = answers.index_select(0, slot).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token_of, answers * weights.flatten()[order, None])


EXPERT_COMPUTE: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "dense": dense,
    "padded": padded,
    "grouped": grouped,
}


def fastest_that_runs(device: torch.device, hidden_size: int, expert_size: int) -> str:
    """``grouped`` if this torch and this device can compute it and its gradient, else ``padded``; loop on a CPU."""
    if device.type == "cpu":
        return "loop"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5

    x, ids = normal(256, hidden_size), torch.arange(512, device=device).view(256, 2) % 4
    tables = [normal(4, 2 * expert_size, hidden_size), normal(4, hidden_size, expert_size)]
    gradients = []
    try:
        for compute in (grouped, loop):
            leaves = [table.clone().requires_grad_() for table in tables]
            output = compute(x.bfloat16(), ids, torch.full_like(ids, 0.5, dtype=torch.bfloat16), *_bfloat16(leaves))
            output.float().square().sum().backward()
            gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    except (RuntimeError, AttributeError) as error:
        print(f"grouped products do not run here ({str(error).splitlines()[0]}); taking padded ones")
        return "padded"
    wrong = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    if wrong > 0.05:
        print(f"grouped products are wrong by {wrong:.1%} here; taking padded ones")
        return "padded"
    return "grouped"


def _bfloat16(tables: list[Tensor]) -> list[Tensor]:
    return [table.bfloat16() for table in tables]


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _sorted_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by expert: (index of each pair [P], its expert [P], its rank among the expert's pairs [P])."""
    flat = ids.flatten()
    expert_of, order = flat.sort(stable=True)
    first = torch.searchsorted(expert_of, torch.arange(num_experts, device=ids.device))
    rank = torch.arange(len(flat), device=ids.device) - first[expert_of]
    return order, expert_of, rank
