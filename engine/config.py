"""Everything an engine can be told at start. Frozen: what may change while it runs is a BrownoutSetting.

Each class checks itself; a bad value raises ConfigError with one sentence that names key, value and allowed values.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A configuration value that cannot work, in one sentence."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights to serve.

    ``path`` is a Hugging Face directory (config.json, tokenizer, safetensors). With ``load_format`` "random" the
    weights are drawn from ``seed`` and no safetensors are needed.
    """

    path: str
    name: str = ""  # as clients call it; default: the directory's name
    load_format: str = "safetensors"
    seed: int = 0
    dtype: str = "auto"  # auto: float32 on CPU, the checkpoint's on a GPU
    max_model_len: int | None = None  # tokens; default: the checkpoint's max_position_embeddings

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", self.path, "a Hugging Face model directory")
        require(self.load_format in LOAD_FORMATS, "model.load_format", self.load_format, ", ".join(LOAD_FORMATS))
        require(0 <= self.seed < 1 << 32, "model.seed", self.seed, "0 to 4294967295")
        require(self.dtype in DTYPES, "model.dtype", self.dtype, ", ".join(DTYPES))
        require(
            self.max_model_len is None or self.max_model_len >= 1,
            "model.max_model_len",
            self.max_model_len,
            "a positive number of tokens",
        )

    @property
    def served_name(self) -> str:
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


LOAD_FORMATS = ("safetensors", "random")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache. One block holds ``block_size`` tokens of one sequence, in every layer."""

    block_size: int = 16
    num_blocks: int | None = None  # default: what `memory_frac` of the device's free memory holds
    memory_frac: float = 0.9  # of what is free beside weights, measured activations and graphs
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        require(
            self.block_size >= 1 and self.block_size & (self.block_size - 1) == 0,
            "cache.block_size",
            self.block_size,
            "a power of two",
        )
        require(self.num_blocks is None or self.num_blocks >= 2, "cache.num_blocks", self.num_blocks, "2 or more")
        require(0 < self.memory_frac <= 1, "cache.memory_frac", self.memory_frac, "in (0, 1]")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """One step computes at most ``max_num_batched_tokens`` tokens of at most ``max_num_seqs`` sequences.

    Sizing: max_num_batched_tokens bounds the longest step, hence TPOT while a prompt is computed in chunks.
    max_num_waiting bounds memory, not latency; about target TTFT x prefill throughput / mean prompt length.

    What else may be done for a promise that dimming alone cannot keep (times are client times, wait included):
    ``chunk_tokens``: token budget of a usual step; when prompts would be late at every level, steps grow from there
    towards max_num_batched_tokens, as far as the pace of running requests allows. Default: always the latter.
    ``deadline_s``: a request whose first token would come later than this goes behind those that can still make it;
    nobody is passed over for more than ten times as long. Default: first come first served.
    ``shed_after_s``: a request whose predicted time to first token exceeds this is refused at once, with the time
    after which to retry. Default: never.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 4096
    chunk_tokens: int | None = None
    deadline_s: float | None = None
    shed_after_s: float | None = None

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, "scheduler.max_num_seqs", self.max_num_seqs, "1 or more")
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "scheduler.max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"at least max_num_seqs ({self.max_num_seqs})",
        )
        require(self.max_num_waiting >= 1, "scheduler.max_num_waiting", self.max_num_waiting, "1 or more")
        require(
            self.chunk_tokens is None or self.max_num_seqs <= self.chunk_tokens <= self.max_num_batched_tokens,
            "scheduler.chunk_tokens",
            self.chunk_tokens,
            f"max_num_seqs ({self.max_num_seqs}) to max_num_batched_tokens ({self.max_num_batched_tokens})",
        )
        for key in ("deadline_s", "shed_after_s"):
            value = getattr(self, key)
            require(value is None or value > 0, f"scheduler.{key}", value, "a positive number of seconds")


@dataclass(frozen=True, slots=True)
class SloConfig:
    """The promise: time to the first token (queue included) and mean time per later token."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        require(self.ttft_s > 0, "slo.ttft_s", self.ttft_s, "a positive number of seconds")
        require(self.tpot_s > 0, "slo.tpot_s", self.tpot_s, "a positive number of seconds")


@dataclass(frozen=True, slots=True)
class BrownoutConfig:
    """What can be dimmed. Live limits (floor, ceiling, budgets) come from the controller, not from here.

    ``united``: where united experts come from: directories made by ``brownoutserve unite``, one for each way, absolute
    or relative to the model's; "average" builds plain averages of the members at start, a baseline no better than
    dropping the experts, for models whose output does not matter.
    ``ways``: which united experts to load; default: those of ``united``.
    ``dimmer``: whose levels a model without a ladder gets. With "united" or "paper" and no united experts, or "exact",
    an engine cannot dim at all.
    ``similarity``: file of expert similarities, for the dimmer "similar" only; absolute or relative to the model's.
    ``united_rows``: room for united experts in each layer, in experts; default: what the loaded ways take. More lets
    another way be loaded beside them while serving.
    ``safe_policy``: when the setting's lease ends without a controller, "governor" goes on dimming for the SLO, never
    deeper than the last setting allowed; "exact" stops dimming.
    ``allow_unmeasured``: a ladder without measured quality losses may be climbed only if this says so by name.
    """

    ways: tuple[int, ...] = ()
    united: str | tuple[str, ...] = "average"
    united_rows: int | None = None
    dimmer: str = "united"
    similarity: str = ""
    ladder: str = ""  # path of a ladder JSON; "": ladder.json beside the model; "default" or none: the dimmer's own
    allow_unmeasured: bool = False
    safe_policy: str = "governor"
    exempt_first: int = 2  # layers never dimmed
    exempt_last: int = 2
    protect: tuple[tuple[int, int], ...] = ()  # (layer, expert) pairs never dimmed
    profile_repeats: int = 3  # steps timed for each level and size at start; 0: none, all levels count as equally fast

    def __post_init__(self) -> None:
        require(all(w in WAYS for w in self.ways), "brownout.ways", list(self.ways), f"any of {list(WAYS)}")
        require(len(set(self.ways)) == len(self.ways), "brownout.ways", list(self.ways), "no way twice")
        require(all(self.united_paths), "brownout.united", self.united, '"average" or paths of united experts')
        require(
            self.united_rows is None or self.united_rows >= 0, "brownout.united_rows", self.united_rows, "0 or more"
        )
        require(self.dimmer in DIMMERS, "brownout.dimmer", self.dimmer, ", ".join(DIMMERS))
        require(self.safe_policy in SAFE_POLICIES, "brownout.safe_policy", self.safe_policy, ", ".join(SAFE_POLICIES))
        require(self.exempt_first >= 0, "brownout.exempt_first", self.exempt_first, "0 or more layers")
        require(self.exempt_last >= 0, "brownout.exempt_last", self.exempt_last, "0 or more layers")
        require(self.profile_repeats >= 0, "brownout.profile_repeats", self.profile_repeats, "0 or more")

    @property
    def united_paths(self) -> tuple[str, ...]:
        """Directories of stored united experts; empty for the baseline."""
        given = (self.united,) if isinstance(self.united, str) else self.united
        return () if given == (AVERAGE,) else given

    @property
    def allowed_ways(self) -> tuple[int, ...]:
        """Ways that stored united experts may have."""
        return self.ways or WAYS


WAYS = (2, 4, 8)
AVERAGE = "average"
DEFAULT_LADDER = "default"
DIMMERS = ("united", "paper", "piggyback", "topk", "similar", "exact")
SAFE_POLICIES = ("governor", "exact")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine on one device."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    brownout: BrownoutConfig = field(default_factory=BrownoutConfig)
    device: str = "auto"  # auto: cuda if there is one, else cpu
    attention: str = "auto"
    kernels: str = "auto"  # auto: triton on a GPU, else torch, the plain reference
    cuda_graphs: bool = True  # decode steps replay CUDA graphs, where kernels and attention can
    overlap_steps: bool | None = None  # launch a step before the last one's tokens are known; default: with CUDA graphs
    num_threads: int | None = None  # torch's CPU threads; default: torch's own choice
    stream_interval_s: float = 0.02  # a stream's tokens are sent at most this often; the first goes at once

    def __post_init__(self) -> None:
        require(self.device in DEVICES, "device", self.device, ", ".join(DEVICES))
        require(self.attention in ATTENTION_BACKENDS, "attention", self.attention, ", ".join(ATTENTION_BACKENDS))
        require(self.kernels in KERNELS, "kernels", self.kernels, ", ".join(KERNELS))
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", self.num_threads, "1 or more")
        require(self.stream_interval_s >= 0, "stream_interval_s", self.stream_interval_s, "0 or more seconds")


DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash_attn", "flash_attn3", "xformers")
KERNELS = ("auto", "torch", "triton")
