"""What an ingress and a replica say to each other over their channel, and its encoding.

The engine's own dataclasses travel as they are, in MessagePack: a field that the engine gains needs no change here.
Each side sends lists, so that whatever came up in one engine step, or in one turn of an event loop, is one message.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from engine.types import EngineBusyError, EngineDeadError, GenerationRequest, InvalidRequestError, RequestOutput

METHOD = "/brownoutserve.Engine/Serve"
TOKEN_KEY = "brownoutserve-token"  # metadata; only who learned the token through Serve may open a channel
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Start a request. Its outputs come back until one has a finish_reason, or until a Refusal."""

    request: GenerationRequest


class Drop(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """End a request of which nobody wants to hear any more."""

    request_id: str


Order = Submit | Drop


class RefusalKind(StrEnum):
    INVALID = "invalid"
    BUSY = "busy"
    DEAD = "dead"  # the engine is; the request may be tried elsewhere
    DRAINING = "draining"  # this replica takes nothing new; the request has not begun here


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A request that ended with one of the engine's errors."""

    request_id: str
    kind: RefusalKind
    message: str
    param: str | None = None
    retry_after_s: float = 0.0


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What all requests of a channel gained since the last one."""

    outputs: list[RequestOutput]
    refusals: list[Refusal]


class DrainingError(Exception):
    """The replica is being taken down and has not begun the request; any other one can take it."""


def refusal(request_id: str, error: Exception) -> Refusal:
    if isinstance(error, InvalidRequestError):
        return Refusal(request_id, RefusalKind.INVALID, error.message, error.param)
    if isinstance(error, EngineBusyError):
        return Refusal(request_id, RefusalKind.BUSY, error.message, retry_after_s=error.retry_after_s)
    if isinstance(error, DrainingError):
        return Refusal(request_id, RefusalKind.DRAINING, str(error))
    return Refusal(request_id, RefusalKind.DEAD, str(error))


def to_error(refusal: Refusal) -> Exception:
    """The error as the replica had it."""
    match refusal.kind:
        case RefusalKind.INVALID:
            return InvalidRequestError(refusal.message, refusal.param)
        case RefusalKind.BUSY:
            return EngineBusyError(refusal.message, refusal.retry_after_s)
        case RefusalKind.DRAINING:
            return DrainingError(refusal.message)
        case RefusalKind.DEAD:
            return EngineDeadError(refusal.message)


encode = msgspec.msgpack.Encoder().encode
decode_orders = msgspec.msgpack.Decoder(list[Order]).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
