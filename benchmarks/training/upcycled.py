"""Training quality-moe: language modelling plus KL to the dense parent, on one GPU or several.

Gradients are averaged over processes started by torchrun; each process draws its own batches. A run that stops at its
time limit leaves a state from which the next one goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.training.loop import ClockSchedule, TokenBatches, make_optimizer, set_rate
from benchmarks.training.moe_model import MoeLm
from benchmarks.training.smollm2 import DenseLm

LOSS_CHUNK = 4096  # tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class TrainOptions:
    total_minutes: float  # of the whole schedule
    minutes: float  # of this run
    num_sequences: int = 16  # per process and step
    num_tokens: int = 1024
    learning_rate: float = 4e-4
    kl_weight: float = 0.5
    balance_weight: float = 0.02
    router_noise: float = 0.3  # of the logits at the start; falls to 0 half-way
    seed: int = 0
    log_every: int = 50


@dataclass
class TrainState:
    """What a run leaves to the next one."""

    seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    loss: float = float("nan")
    kl: float = float("nan")
    balance: float = float("nan")


def train(
    model: MoeLm, parent: DenseLm, tokens: np.ndarray, options: TrainOptions, state_file: Path
) -> tuple[TrainState, bool]:
    """Train until this run's minutes are over or the schedule is; returns the state and whether it is complete."""
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = make_optimizer(model, options.learning_rate, weight_decay=0.01)
    state = TrainState()
    if state_file.exists():
        stored = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        state = TrainState(**stored["state"])
    batches = TokenBatches(tokens, device, seed=options.seed + 1000 * (state.num_steps + 1) + rank)
    schedule = ClockSchedule(options.total_minutes * 60)
    earlier_s, started_s = state.seconds, time.monotonic()
    model.train()
    while True:
        state.seconds = earlier_s + _slowest(time.monotonic() - started_s, device, world)
        done = state.seconds / (options.total_minutes * 60)
        if done >= 1 or state.seconds - earlier_s >= options.minutes * 60:
            break
        set_rate(optimizer, options.learning_rate * schedule.rate(done))
        for layer in model.layers:
            layer.moe.router_noise = options.router_noise * max(0.0, 1 - 2 * done)
        batch = batches.draw(options.num_sequences, options.num_tokens)
        lm, kl, balance = losses(model, parent, batch)
        loss = (1 - options.kl_weight) * lm + options.kl_weight * kl + options.balance_weight * balance
        loss.backward()
        _average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.num_steps += 1
        state.num_tokens += world * options.num_sequences * options.num_tokens
        if state.num_steps % options.log_every == 0 or state.num_steps == 1:
            state.loss, state.kl, state.balance = lm.item(), kl.item(), balance.item()
            if rank == 0:
                print(
                    f"step {state.num_steps}, {done:.0%}, {state.num_tokens / 1e6:.1f} M tokens: "
                    f"loss {state.loss:.3f}, KL {state.kl:.3f}, balance {state.balance:.2f}",
                    flush=True,
                )
    complete = done >= 1
    if rank == 0 and not complete:
        stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)}
        torch.save(stored, state_file)
    return state, complete


def losses(model: MoeLm, parent: DenseLm, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, KL(parent, model) in nats per token, and the load-balancing loss. batch [B, T + 1]."""
    on_gpu = batch.device.type == "cuda"
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=on_gpu):
        hidden, balance = model.hidden(batch[:, :-1])
        with torch.no_grad():
            wanted = parent.hidden(batch[:, :-1])
        targets = batch[:, 1:].flatten()
        cross_entropy = kl = torch.zeros((), device=batch.device)
        for start in range(0, len(targets), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            chunk = checkpoint(
                _chunk_losses,
                hidden.flatten(0, 1)[part],
                model.embedding.weight,
                wanted.flatten(0, 1)[part],
                parent.embedding.weight,
                targets[part],
                use_reentrant=False,
            )
            cross_entropy, kl = cross_entropy + chunk[0], kl + chunk[1]
    return cross_entropy / len(targets), kl / len(targets), balance


def _chunk_losses(
    hidden: Tensor, embedding: Tensor, wanted: Tensor, parent_embedding: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the chunk's tokens: the logits are recomputed in the backward pass, not kept."""
    log_probs = F.linear(hidden, embedding).float().log_softmax(dim=-1)
    with torch.no_grad():
        wanted_log_probs = F.linear(wanted, parent_embedding).float().log_softmax(dim=-1)
    kl = F.kl_div(log_probs, wanted_log_probs, reduction="sum", log_target=True)
    return F.nll_loss(log_probs, targets, reduction="sum"), kl


def _average_gradients(model: MoeLm, world: int) -> None:
    if world == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, world)


def _slowest(seconds: float, device: torch.device, world: int) -> float:
    """The longest of all processes' times, so that they stop at the same step."""
    if world == 1:
        return seconds
    longest = torch.tensor(seconds, device=device, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)
