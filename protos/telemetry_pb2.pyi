from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PREFILL: _ClassVar[Phase]
    DECODE: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PREFILL: Phase
DECODE: Phase

class QuantileSketch(_message.Message):
    __slots__ = ("relative_error", "bucket", "count", "zero_count", "sum")
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ZERO_COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    relative_error: float
    bucket: _containers.RepeatedScalarFieldContainer[int]
    count: _containers.RepeatedScalarFieldContainer[int]
    zero_count: int
    sum: float
    def __init__(self, relative_error: _Optional[float] = ..., bucket: _Optional[_Iterable[int]] = ..., count: _Optional[_Iterable[int]] = ..., zero_count: _Optional[int] = ..., sum: _Optional[float] = ...) -> None: ...

class PhaseWindow(_message.Message):
    __slots__ = ("phase", "num_steps", "num_tokens", "level_tokens", "level_peak", "step_time_s", "shapes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_PEAK_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    num_steps: int
    num_tokens: int
    level_tokens: int
    level_peak: int
    step_time_s: QuantileSketch
    shapes: _containers.RepeatedCompositeFieldContainer[ShapeWindow]
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., level_tokens: _Optional[int] = ..., level_peak: _Optional[int] = ..., step_time_s: _Optional[_Union[QuantileSketch, _Mapping]] = ..., shapes: _Optional[_Iterable[_Union[ShapeWindow, _Mapping]]] = ...) -> None: ...

class ShapeWindow(_message.Message):
    __slots__ = ("log2_tokens", "num_steps", "step_time_s")
    LOG2_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    log2_tokens: int
    num_steps: int
    step_time_s: float
    def __init__(self, log2_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., step_time_s: _Optional[float] = ...) -> None: ...

class ClassWindow(_message.Message):
    __slots__ = ("service_class", "num_finished", "num_failed", "num_ttft_ok", "num_tpot_ok", "queue_wait_s", "ttft_s", "tpot_s", "num_tokens", "loss_nats")
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_TTFT_OK_FIELD_NUMBER: _ClassVar[int]
    NUM_TPOT_OK_FIELD_NUMBER: _ClassVar[int]
    QUEUE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_NATS_FIELD_NUMBER: _ClassVar[int]
    service_class: str
    num_finished: int
    num_failed: int
    num_ttft_ok: int
    num_tpot_ok: int
    queue_wait_s: QuantileSketch
    ttft_s: QuantileSketch
    tpot_s: QuantileSketch
    num_tokens: int
    loss_nats: float
    def __init__(self, service_class: _Optional[str] = ..., num_finished: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_ttft_ok: _Optional[int] = ..., num_tpot_ok: _Optional[int] = ..., queue_wait_s: _Optional[_Union[QuantileSketch, _Mapping]] = ..., ttft_s: _Optional[_Union[QuantileSketch, _Mapping]] = ..., tpot_s: _Optional[_Union[QuantileSketch, _Mapping]] = ..., num_tokens: _Optional[int] = ..., loss_nats: _Optional[float] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("layer", "active_experts", "balance_index", "num_hot", "hot_expert", "hot_share")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BALANCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_HOT_FIELD_NUMBER: _ClassVar[int]
    HOT_EXPERT_FIELD_NUMBER: _ClassVar[int]
    HOT_SHARE_FIELD_NUMBER: _ClassVar[int]
    layer: _containers.RepeatedScalarFieldContainer[int]
    active_experts: _containers.RepeatedScalarFieldContainer[float]
    balance_index: _containers.RepeatedScalarFieldContainer[float]
    num_hot: int
    hot_expert: _containers.RepeatedScalarFieldContainer[int]
    hot_share: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[_Iterable[int]] = ..., active_experts: _Optional[_Iterable[float]] = ..., balance_index: _Optional[_Iterable[float]] = ..., num_hot: _Optional[int] = ..., hot_expert: _Optional[_Iterable[int]] = ..., hot_share: _Optional[_Iterable[float]] = ...) -> None: ...

class StepWindow(_message.Message):
    __slots__ = ("replica_id", "model_id", "incarnation", "sequence", "window_s", "phases", "classes", "num_running", "num_waiting", "queued_prefill_tokens", "oldest_wait_s", "kv_used_frac", "level_prefill", "level_decode", "routed_pairs", "dimmed_pairs", "num_preemptions", "applied_epoch", "applied_version", "lease_expired", "trim", "predicted_step_time_s", "measured_per_predicted", "experts")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    KV_USED_FRAC_FIELD_NUMBER: _ClassVar[int]
    LEVEL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    LEVEL_DECODE_FIELD_NUMBER: _ClassVar[int]
    ROUTED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DIMMED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    TRIM_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PER_PREDICTED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model_id: str
    incarnation: int
    sequence: int
    window_s: float
    phases: _containers.RepeatedCompositeFieldContainer[PhaseWindow]
    classes: _containers.RepeatedCompositeFieldContainer[ClassWindow]
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    oldest_wait_s: float
    kv_used_frac: float
    level_prefill: int
    level_decode: int
    routed_pairs: int
    dimmed_pairs: int
    num_preemptions: int
    applied_epoch: int
    applied_version: int
    lease_expired: bool
    trim: float
    predicted_step_time_s: _containers.RepeatedScalarFieldContainer[float]
    measured_per_predicted: QuantileSketch
    experts: ExpertLoad
    def __init__(self, replica_id: _Optional[str] = ..., model_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., window_s: _Optional[float] = ..., phases: _Optional[_Iterable[_Union[PhaseWindow, _Mapping]]] = ..., classes: _Optional[_Iterable[_Union[ClassWindow, _Mapping]]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., oldest_wait_s: _Optional[float] = ..., kv_used_frac: _Optional[float] = ..., level_prefill: _Optional[int] = ..., level_decode: _Optional[int] = ..., routed_pairs: _Optional[int] = ..., dimmed_pairs: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., applied_epoch: _Optional[int] = ..., applied_version: _Optional[int] = ..., lease_expired: _Optional[bool] = ..., trim: _Optional[float] = ..., predicted_step_time_s: _Optional[_Iterable[float]] = ..., measured_per_predicted: _Optional[_Union[QuantileSketch, _Mapping]] = ..., experts: _Optional[_Union[ExpertLoad, _Mapping]] = ...) -> None: ...
