"""What every training loop needs: batches drawn on the device, a schedule by the clock, the language-model loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenBatches:
    """Random windows of a token array that lives on the device."""

    def __init__(self, tokens: np.ndarray, device: torch.device, seed: int) -> None:
        self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self, num_sequences: int, num_tokens: int) -> Tensor:
        """[B, T + 1] int64"""
        last = len(self._tokens) - num_tokens - 1
        starts = torch.randint(last, (num_sequences, 1), generator=self._generator, device=self._tokens.device)
        return self._tokens[starts + torch.arange(num_tokens + 1, device=starts.device)].long()


class ClockSchedule:
    """Learning rate as a share of the highest, by the share of the time that has passed: warm-up, then cosine.

    Ends with the time, whatever a step costs on this machine.
    """

    WARMUP_FRAC = 0.02
    FLOOR = 0.02

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start_s = time.monotonic()

    @property
    def passed_frac(self) -> float:
        return (time.monotonic() - self._start_s) / self._seconds

    def rate(self, passed_frac: float) -> float:
        if passed_frac < self.WARMUP_FRAC:
            return max(self.FLOOR, passed_frac / self.WARMUP_FRAC)
        done = min(1.0, (passed_frac - self.WARMUP_FRAC) / (1 - self.WARMUP_FRAC))
        return self.FLOOR + (1 - self.FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    on_gpu = matrices[0].device.type == "cuda"
    groups: Iterable[dict] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=on_gpu)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats. logits [B, T, V], targets [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor, batch: int) -> float:
    """Mean next-token loss on sequences [S, T]."""
    model.eval()
    losses = []
    device = next(model.parameters()).device
    for part in sequences.split(batch):
        tokens = part.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, _ = model(tokens[:, :-1])
        losses.append(lm_loss(logits, tokens[:, 1:]) * len(part))
    model.train()
    return float(torch.stack(losses).sum()) / len(sequences)


@torch.no_grad()
def sample_text(model: nn.Module, prompt: Tensor, num_tokens: int, temperature: float, seed: int) -> Tensor:
    """Continues prompts [B, T] by ``num_tokens`` sampled tokens; recomputes the context for each."""
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens = prompt
    for _ in range(num_tokens):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
            logits, _ = model(tokens)
        probs = (logits[:, -1].float() / temperature).softmax(dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(probs, 1, generator=generator)), dim=1)
    model.train()
    return tokens
