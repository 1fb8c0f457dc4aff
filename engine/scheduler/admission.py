"""Who may enter: checks on arrival (can this request ever be served?) and at the batch's door. Pure."""

from __future__ import annotations

from engine.kv_cache.blocks import BlockManager
from engine.scheduler.sequence import Sequence
from engine.types import EngineBusyError, GenerationRequest, InvalidRequestError


def check_request(request: GenerationRequest, max_model_len: int, vocab_size: int) -> None:
    """Raises InvalidRequestError, naming the field, for a request that can never be served."""
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise InvalidRequestError("prompt must hold at least one token", "prompt")
    if num_prompt >= max_model_len:
        raise InvalidRequestError(
            f"prompt has {num_prompt} tokens; with at least one to generate, the context length allows "
            f"{max_model_len - 1}",
            "prompt",
        )
    if num_prompt + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}; after a prompt of {num_prompt} tokens the context length "
            f"({max_model_len}) leaves {max_model_len - num_prompt}",
            "max_tokens",
        )
    for token_id in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"prompt has token id {token_id}; ids go from 0 to {vocab_size - 1}", "prompt")
    for token_id, _ in request.sampling.logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"logit_bias has token id {token_id}; ids go up to {vocab_size - 1}", "logit_bias"
            )


def check_queue(num_waiting: int, max_num_waiting: int) -> None:
    """Raises EngineBusyError when the waiting queue is full."""
    if num_waiting >= max_num_waiting:
        raise EngineBusyError(f"{num_waiting} requests are waiting, the most is {max_num_waiting}")


def check_wait(predicted_ttft_s: float | None, shed_after_s: float | None) -> None:
    """Raises EngineBusyError when the first token would come too late to be worth waiting for; None: unknown."""
    if predicted_ttft_s is None or shed_after_s is None or predicted_ttft_s <= shed_after_s:
        return
    raise EngineBusyError(
        f"the first token would come after {predicted_ttft_s:.2f} s, later than the {shed_after_s:g} s allowed here",
        retry_after_s=predicted_ttft_s - shed_after_s,
    )


def has_room(sequence: Sequence, num_cached: int, blocks: BlockManager) -> bool:
    """Whether free blocks cover all the sequence's tokens but the ``num_cached`` that it shares, and the next one.

    Asking for all, not only for the first chunk, keeps a prompt from being preempted halfway by its own neighbours.
    """
    return num_cached + blocks.num_free * blocks.block_size > len(sequence.token_ids)
