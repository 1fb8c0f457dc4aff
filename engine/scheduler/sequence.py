"""A request inside the engine: its tokens, how many of them have KV, and what it cost so far. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.types import BrownoutUsage, GenerationRequest, ServiceClass, Usage


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine thread.

    tokens:  [0 ........ num_computed) have KV, or will after the steps under way; the others are to be computed
             [0 .. num_prompt) prompt  [num_prompt .. len) generated  [len .. len + num_pending) being chosen
    """

    request: GenerationRequest
    arrival_s: float  # on the engine's clock, what the request waited before included
    request_id: str = field(init=False)
    num_prompt: int = field(init=False)
    exact: bool = field(init=False)  # refuses to be dimmed
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    num_pending: int = 0  # tokens that steps under way will choose
    max_len: int = field(init=False)  # tokens that it may reach, prompt included; the last one is never computed
    num_reserved: int = 0  # tokens that its blocks hold
    place: int = -1  # in the batch, while running
    admission: int = 0  # number of its latest admission; 0 while it holds no place
    num_cached: int = 0  # prompt tokens served by the prefix cache at first admission
    admitted_s: float | None = None  # first admission
    first_token_s: float | None = None
    last_token_s: float | None = None
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    level_peak: int = 0  # of its steps, and of those that computed what it reuses
    level_tokens: int = 0  # sum over computed tokens of their level
    computed_tokens: int = 0  # recomputation after preemption included
    setting_version: int = 0  # in force at its newest step
    first_setting_version: int | None = None  # ... and at its first

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.num_prompt = len(self.request.prompt_ids)
        self.exact = self.request.service_class is ServiceClass.FULL
        self.token_ids = list(self.request.prompt_ids)
        self.max_len = len(self.token_ids) + max(1, self.request.sampling.max_tokens)

    def append(self, token_id: int) -> None:
        """Take in the token that a step chose."""
        self.token_ids.append(token_id)
        self.num_pending -= 1

    def charge(self, num_tokens: int, routed_pairs: int, setting_version: int) -> None:
        """A step computed tokens of it, under the setting in force."""
        self.computed_tokens += num_tokens
        self.routed_pairs += routed_pairs
        self.setting_version = setting_version
        if self.first_setting_version is None:
            self.first_setting_version = setting_version

    def charge_dimmed(self, num_tokens: int, dimmed_pairs: int, level: int) -> None:
        """... and so much of it was dimmed."""
        self.dimmed_pairs += dimmed_pairs
        self.level_tokens += num_tokens * level
        if level > self.level_peak:
            self.level_peak = level

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be chosen; 0 when the last one is being chosen."""
        num_known = len(self.token_ids) + self.num_pending
        return (num_known if num_known < self.max_len else self.max_len - 1) - self.num_computed

    @property
    def decoding(self) -> bool:
        """Exactly the newest token is to be computed, and it is a generated one."""
        num_known = len(self.token_ids) + self.num_pending
        return self.num_prompt < num_known < self.max_len and num_known - self.num_computed == 1

    @property
    def wants_prompt_logits(self) -> bool:
        """Of every token of its prompt, for their log-probabilities."""
        return self.request.sampling.prompt_logprobs is not None

    @property
    def reusable_ids(self) -> list[int]:
        """Tokens whose KV may come from the prefix cache; log-probabilities of a prompt need all of it computed."""
        return self.token_ids[:1] if self.wants_prompt_logits else self.token_ids

    def usage(self) -> Usage:
        brownout = BrownoutUsage(
            routed_pairs=self.routed_pairs,
            dimmed_pairs=self.dimmed_pairs,
            level_peak=self.level_peak,
            level_mean=self.level_tokens / self.computed_tokens if self.computed_tokens else 0.0,
            setting_version=self.setting_version,
        )
        return Usage(self.num_prompt, self.num_cached, self.num_generated, brownout)
