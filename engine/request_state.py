"""One request in the engine: its sequence, how it samples, its text, and when it ends."""

from __future__ import annotations

import logging
import zlib

from engine.request_log import RequestRecord
from engine.sampling.grammar import GrammarState
from engine.sampling.state import SamplingState
from engine.scheduler.sequence import Sequence
from engine.text.detokenize import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from engine.types import FinishReason, GenerationRequest, RequestOutput, TokenLogprob, Usage

logger = logging.getLogger(__name__)


class RequestState:
    """Created when a request arrives, dropped when it ends."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        arrival_s: float,
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        params = self._params = request.sampling
        self.sequence = Sequence(request, arrival_s)
        self._stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else tokenizer.eos_token_ids
        )
        fallback_seed = zlib.crc32(request.request_id.encode())
        self.sampling = SamplingState(params, request.prompt_ids, vocab_size, self._stop_ids, fallback_seed, grammar)
        self.needs_host = self.sampling.needs_host  # for a while at least
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, params.stop, params.include_stop_str_in_output, params.min_tokens, params.skip_special_tokens
        )

    def append(self, token_id: int, logprob: TokenLogprob | None, now_s: float, max_model_len: int) -> RequestOutput:
        """Take in a sampled token; the output's finish_reason says whether it was the last."""
        sequence, sampling, params = self.sequence, self.sampling, self._params
        sequence.append(token_id)
        sampling.append(token_id)
        prompt_logprobs = sampling.take_prompt_logprobs() if sampling.prompt_logprobs is not None else None
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        sequence.last_token_s = now_s
        num_generated, grammar = sequence.num_generated, sampling.grammar
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        error = grammar.error if grammar is not None else None
        if error is not None:
            reason = FinishReason.ERROR
        elif token_id in self._stop_ids and num_generated >= params.min_tokens:
            reason = FinishReason.STOP
            stop_reason = token_id if token_id in params.stop_token_ids else None
        else:
            text, stop_reason = self._detokenizer.append((token_id,))
            if stop_reason is not None or (grammar is not None and grammar.finished):
                reason = FinishReason.STOP
            elif num_generated >= params.max_tokens or len(sequence.token_ids) >= max_model_len:
                reason = FinishReason.LENGTH
        return RequestOutput(
            sequence.request_id,
            (token_id,),
            text,
            (logprob,) if logprob is not None else None,
            reason,
            stop_reason,
            error=error,
            prompt_logprobs=prompt_logprobs,
        )

    def final_output(self, reason: FinishReason, output: RequestOutput | None) -> RequestOutput:
        """The last output: ``output`` of the last step, if any, with the rest of the text and the usage."""
        output = output or RequestOutput(self.sequence.request_id)
        usage = self.sequence.usage()
        if logger.isEnabledFor(logging.INFO):
            logger.info("finished", extra={"fields": self._log_fields(reason, usage)})
        return output._replace(text=output.text + self._detokenizer.flush(), finish_reason=reason, usage=usage)

    def _log_fields(self, reason: FinishReason, usage: Usage) -> dict[str, object]:
        """For one line with the ingress' ids, never with text."""
        return {
            **self.sequence.request.log_fields,
            "finish_reason": reason.value,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "level_peak": usage.brownout.level_peak,
        }

    def record(self, reason: FinishReason, now_s: float, unix_time_s: float) -> RequestRecord:
        """What became of it, ended at ``now_s`` on the engine's clock."""
        sequence = self.sequence
        usage = sequence.usage()
        return RequestRecord(
            request_id=sequence.request_id,
            service_class=str(sequence.request.service_class),
            finish_reason=str(reason),
            ended_at_s=unix_time_s,
            duration_s=now_s - sequence.arrival_s,
            queue_wait_s=_after(sequence.admitted_s, sequence.arrival_s),
            ttft_s=_after(sequence.first_token_s, sequence.arrival_s),
            tpot_s=self.mean_tpot_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            routed_pairs=usage.brownout.routed_pairs,
            dimmed_pairs=usage.brownout.dimmed_pairs,
            level_mean=usage.brownout.level_mean,
            level_peak=usage.brownout.level_peak,
            first_setting_version=sequence.first_setting_version or 0,
            last_setting_version=sequence.setting_version,
        )

    @property
    def mean_tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        sequence = self.sequence
        if sequence.first_token_s is None or sequence.last_token_s is None or sequence.num_generated < 2:
            return None
        return (sequence.last_token_s - sequence.first_token_s) / (sequence.num_generated - 1)


def _after(at_s: float | None, start_s: float) -> float | None:
    return None if at_s is None else at_s - start_s
