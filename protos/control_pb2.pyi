from protos import telemetry_pb2 as _telemetry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("replica_id", "model_id", "incarnation", "num_levels", "ladder_measured", "applied_epoch", "applied_version", "level_loss", "applied", "start_s", "max_num_seqs", "max_num_batched_tokens", "full_step_time_s")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_LEVELS_FIELD_NUMBER: _ClassVar[int]
    LADDER_MEASURED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_LOSS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model_id: str
    incarnation: int
    num_levels: int
    ladder_measured: bool
    applied_epoch: int
    applied_version: int
    level_loss: _containers.RepeatedScalarFieldContainer[float]
    applied: BrownoutSetting
    start_s: float
    max_num_seqs: int
    max_num_batched_tokens: int
    full_step_time_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, replica_id: _Optional[str] = ..., model_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., num_levels: _Optional[int] = ..., ladder_measured: _Optional[bool] = ..., applied_epoch: _Optional[int] = ..., applied_version: _Optional[int] = ..., level_loss: _Optional[_Iterable[float]] = ..., applied: _Optional[_Union[BrownoutSetting, _Mapping]] = ..., start_s: _Optional[float] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., full_step_time_s: _Optional[_Iterable[float]] = ...) -> None: ...

class ReplicaMessage(_message.Message):
    __slots__ = ("hello", "window")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    window: _telemetry_pb2.StepWindow
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., window: _Optional[_Union[_telemetry_pb2.StepWindow, _Mapping]] = ...) -> None: ...

class PhaseSetting(_message.Message):
    __slots__ = ("phase", "floor", "ceiling", "budget_s", "margin")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    phase: _telemetry_pb2.Phase
    floor: int
    ceiling: int
    budget_s: float
    margin: float
    def __init__(self, phase: _Optional[_Union[_telemetry_pb2.Phase, str]] = ..., floor: _Optional[int] = ..., ceiling: _Optional[int] = ..., budget_s: _Optional[float] = ..., margin: _Optional[float] = ...) -> None: ...

class BrownoutSetting(_message.Message):
    __slots__ = ("epoch", "version", "lease_s", "model_id", "law", "reason", "phases")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAW_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: int
    lease_s: float
    model_id: str
    law: str
    reason: str
    phases: _containers.RepeatedCompositeFieldContainer[PhaseSetting]
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[int] = ..., lease_s: _Optional[float] = ..., model_id: _Optional[str] = ..., law: _Optional[str] = ..., reason: _Optional[str] = ..., phases: _Optional[_Iterable[_Union[PhaseSetting, _Mapping]]] = ...) -> None: ...

class ControllerMessage(_message.Message):
    __slots__ = ("setting",)
    SETTING_FIELD_NUMBER: _ClassVar[int]
    setting: BrownoutSetting
    def __init__(self, setting: _Optional[_Union[BrownoutSetting, _Mapping]] = ...) -> None: ...
