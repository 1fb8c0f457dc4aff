"""What dimming does to words: the same prompts, continued at level 0 and at the strongest level of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from rich.table import Table

from benchmarks.scenario import SampleSection
from cluster.controller_client import ControllerClient


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation; ``level`` and ``dimmed_share`` as its answer tells them."""

    model: str
    prompt: str
    level: int
    dimmed_share: float
    text: str


def read_samples(url: str, controller: ControllerClient, section: SampleSection, seed: int) -> list[Sample]:
    """Leaves the model with the configured law. Raises RuntimeError if a replica does not take a level in time, and
    httpx.HTTPError if a request fails."""
    replicas = controller.status()["models"][section.model]["replicas"].values()
    strongest = min(replica["num_levels"] for replica in replicas) - 1
    samples = []
    try:
        for level in (0, strongest):
            controller.set_policy("static", level, section.model)
            controller.wait_applied(section.model)
            samples += [_continue(url, section, prompt, seed) for prompt in section.prompts]
    finally:
        controller.set_policy("auto", model=section.model)
    return samples


def samples_table(samples: Sequence[Sample]) -> Table:
    table = Table(title="What dimming does to words", show_lines=True)
    table.add_column("level", justify="right")
    table.add_column("dimmed", justify="right")
    table.add_column(samples[0].model)
    for sample in sorted(samples, key=lambda s: (s.prompt, s.level)):
        table.add_row(str(sample.level), f"{sample.dimmed_share:.0%}", f"[bold]{sample.prompt}[/bold]{sample.text}")
    return table


def _continue(url: str, section: SampleSection, prompt: str, seed: int) -> Sample:
    body: dict[str, Any] = {
        "model": section.model,
        "prompt": prompt,
        "max_tokens": section.max_tokens,
        "temperature": section.temperature,
        "seed": seed,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    brownout = answer["usage"]["brownout"]
    text = " ".join(answer["choices"][0]["text"].splitlines())
    return Sample(section.model, prompt, brownout["level_peak"], brownout["dimmed_share"], text)
