"""Small arrays to the device and back, without the host waiting for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch import Array


def send(values: Array, device: torch.device) -> Tensor:
    """``values`` on the device, behind what was launched there; a copy from pageable memory would wait for that."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def fetch(tensor: Tensor) -> Tensor:
    """A host tensor that holds ``tensor`` once the device has done what has been launched by now."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
