"""The engine's vocabulary: what goes in, what comes out, what a setting says. Pure data, no torch.

Legend used in all MoE code: T tokens (rows of a step), E original experts, U united experts, A experts per token,
D hidden size, F expert FFN width, L layers, V vocabulary, N sequences of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple


class InvalidRequestError(ValueError):
    """A request that can never be served; ``param`` names the offending field as the OpenAI API spells it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class EngineBusyError(RuntimeError):
    """The waiting queue is full; try again after ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[EngineBusyError], tuple[str, float]]:
        return type(self), (self.message, self.retry_after_s)


class EngineDeadError(RuntimeError):
    """The engine loop has stopped; the replica must be replaced."""


class Phase(IntEnum):
    """A row's phase. Law, window and setting exist per phase; it is always a parameter, never a name prefix."""

    PREFILL = 0
    DECODE = 1


class ServiceClass(StrEnum):
    """A request's consent to be dimmed."""

    STANDARD = "standard"  # may be dimmed
    FULL = "full"  # never dimmed


class FinishReason(StrEnum):
    """Every way in which a request ends inside the engine."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the engine failed; `RequestOutput.error` says how


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Names and meanings are the OpenAI API's, and vLLM's where OpenAI has none.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 and ``top_p`` 1.0 keep all tokens. ``logprobs`` is the number of
    alternatives to report besides the chosen token (0: the chosen one only; None: no logprobs at all);
    ``prompt_logprobs`` is the same for the prompt's own tokens. ``grammar`` is one of llguidance that the answer must
    follow; the request then ends when nothing can follow. ``allowed_token_ids``: no others are chosen; empty: all are.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    grammar: str | None = None
    allowed_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True  # in the text

    MAX_LOGPROBS = 20  # OpenAI's limit on top_logprobs
    MAX_STOP_STRINGS = 16

    def __post_init__(self) -> None:
        self._require(self.max_tokens >= 1, "max_tokens", f"must be at least 1, got {self.max_tokens}")
        self._require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}",
        )
        self._require(0 <= self.temperature <= 2, "temperature", f"must be between 0 and 2, got {self.temperature}")
        self._require(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}")
        self._require(self.top_k >= -1, "top_k", f"must be 0 or -1 (all tokens) or at least 1, got {self.top_k}")
        self._require(0 <= self.min_p <= 1, "min_p", f"must be between 0 and 1, got {self.min_p}")
        self._require(
            0 < self.repetition_penalty <= 2,
            "repetition_penalty",
            f"must be in (0, 2], got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._require(-2 <= value <= 2, name, f"must be between -2 and 2, got {value}")
        for token_id, bias in self.logit_bias:
            self._require(token_id >= 0, "logit_bias", f"keys must be token ids, got {token_id}")
            self._require(-100 <= bias <= 100, "logit_bias", f"values must be between -100 and 100, got {bias}")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            self._require(
                number is None or 0 <= number <= self.MAX_LOGPROBS,
                name,
                f"must be between 0 and {self.MAX_LOGPROBS}, got {number}",
            )
        self._require(
            len(self.stop) <= self.MAX_STOP_STRINGS,
            "stop",
            f"has {len(self.stop)} strings, the most is {self.MAX_STOP_STRINGS}",
        )
        self._require(all(self.stop), "stop", "must not contain an empty string")
        self._require(
            not (self.allowed_token_ids and self.grammar), "allowed_token_ids", "cannot be combined with a grammar"
        )

    @staticmethod
    def _require(holds: bool, param: str, message: str) -> None:
        if not holds:
            raise InvalidRequestError(f"{param} {message}", param)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_top(self) -> int | None:
        """``top_k`` as a number of tokens; None: all."""
        return self.top_k if self.top_k > 0 else None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue. ``waited_s`` is what the request already waited before the engine saw it.

    Of waiting requests the one with the least ``priority`` goes first. ``traceparent`` is the W3C trace context that
    the request belongs to, for log lines; empty: none. Requests of one ``session_id`` go to one replica if they can.
    Cached prefixes are shared by requests of one ``cache_salt`` only.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    service_class: ServiceClass = ServiceClass.STANDARD
    waited_s: float = 0.0
    priority: int = 0
    traceparent: str = ""
    session_id: str = ""
    cache_salt: str = ""

    @property
    def log_fields(self) -> dict[str, str | None]:
        """Who it is, the same in the log lines of all parts that it passes; never what it says."""
        parts = self.traceparent.split("-")
        trace_id, span_id = parts[1:3] if len(parts) == 4 else (None, None)
        return {"request_id": self.request_id, "trace_id": trace_id, "parent_span_id": span_id}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the most likely alternatives ``(token_id, logprob)``, best first.

    They belong to the model's own distribution, before temperature, penalties and truncation.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # of a prompt's token among all: 1 is the likeliest


@dataclass(frozen=True, slots=True)
class BrownoutUsage:
    """How much a request was dimmed."""

    routed_pairs: int = 0  # (token, expert) pairs that the gate chose, over all layers
    dimmed_pairs: int = 0  # of these, served by a united expert
    level_peak: int = 0
    level_mean: float = 0.0  # over the request's computed tokens
    setting_version: int = 0  # of the newest setting that served it; 0: none yet

    @property
    def dimmed_share(self) -> float:
        return self.dimmed_pairs / self.routed_pairs if self.routed_pairs else 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request so far."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens served from the prefix cache
    completion_tokens: int
    brownout: BrownoutUsage


class RequestOutput(NamedTuple):
    """What a request gained since its last output. The last one has a ``finish_reason``.

    A named tuple, because each step makes one per running sequence.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each of token_ids, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that matched
    usage: Usage | None = None  # on the last output
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # on the first output, if asked for; the first None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class PhaseSetting:
    """What the governor may do in one phase: the least level in [floor, ceiling] that meets budget_s * margin."""

    floor: int
    ceiling: int
    budget_s: float  # TTFT for PREFILL, TPOT for DECODE
    margin: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.ceiling:
            raise ValueError(f"floor {self.floor} and ceiling {self.ceiling} must satisfy 0 <= floor <= ceiling")
        if not (self.budget_s > 0 and self.margin > 0):
            raise ValueError(f"budget_s {self.budget_s} and margin {self.margin} must be positive")


@dataclass(frozen=True, slots=True)
class BrownoutSetting:
    """A versioned, leased order from the controller. Totally ordered by (epoch, version)."""

    prefill: PhaseSetting
    decode: PhaseSetting
    epoch: int = 0
    version: int = 0
    lease_s: float = float("inf")
    law: str = "static"
    reason: str = "startup"

    def newer_than(self, other: BrownoutSetting) -> bool:
        return (self.epoch, self.version) > (other.epoch, other.version)

    @staticmethod
    def pinned(level: int, reason: str = "startup") -> BrownoutSetting:
        """Both phases fixed at ``level``, whatever the latency."""
        phase = PhaseSetting(floor=level, ceiling=level, budget_s=float("inf"))
        return BrownoutSetting(prefill=phase, decode=phase, reason=reason)


@dataclass(frozen=True, slots=True)
class Levels:
    """The brownout level of each phase in one step."""

    prefill: int = 0
    decode: int = 0

    def of(self, phase: Phase) -> int:
        return self.decode if phase is Phase.DECODE else self.prefill

    @property
    def peak(self) -> int:
        return max(self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a started engine serves and can do."""

    name: str
    vocab_size: int
    max_model_len: int  # tokens, prompt and completion together
    num_blocks: int
    block_size: int
    num_levels: int  # of the ladder, level 0 included; 1: cannot dim
    ladder_measured: bool
    level_names: tuple[str, ...] = ("exact",)
    level_loss: tuple[float, ...] = ()  # quality loss in nats at each level; empty when not measured
    max_num_seqs: int = 1  # sequences of one step
    max_num_batched_tokens: int = 1  # tokens of one step
    step_time_s_by_level: tuple[float, ...] = ()  # profiled at start with a full decode batch; empty: no profile
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A replica's load at one moment: what the router, the governor and the operator look at."""

    num_running: int = 0
    num_waiting: int = 0
    max_num_seqs: int = 1
    queued_prefill_tokens: int = 0
    oldest_wait_s: float = 0.0
    kv_used_frac: float = 0.0
    num_free_blocks: int = 0
    levels: Levels = field(default_factory=Levels)
    predicted_step_s: float = 0.0  # at the current levels, for the recent batch shape
    num_preemptions: int = 0  # since start
    num_steps: int = 0  # since start
    num_tokens: int = 0  # computed since start, prompt and completion
    setting_version: int = 0
    lease_expired: bool = False
