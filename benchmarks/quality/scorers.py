"""Log-likelihoods and greedy continuations from an engine in this process or from a server, at a pinned level."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.quality.scoring import Request, TokenScore
from engine.engine import Engine
from engine.types import BrownoutSetting, GenerationRequest, RequestOutput, SamplingParams

MAX_CLIENTS = 32  # requests in flight at a server
APPLY_TIMEOUT_S = 120.0


class EngineScorer:
    """An engine in this process, pinned at ``level``; several may share one engine."""

    def __init__(self, engine: Engine, level: int) -> None:
        self._engine, self._level = engine, level

    def score(self, requests: Sequence[Request]) -> list[float]:
        return [sum(token.logprob for token in tokens) for tokens in self.token_scores(requests)]

    def token_scores(self, requests: Sequence[Request]) -> list[list[TokenScore]]:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, ignore_eos=True)
        scores = []
        for request, outputs in zip(requests, self._run([r.ids for r in requests], params), strict=True):
            said = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None)
            tokens = [token for token in said[request.start :] if token is not None]
            scores.append([TokenScore(t.logprob, t.top[0][0] == t.token_id, t.top[0][0]) for t in tokens])
        return scores

    def continue_greedily(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int] | list[str]]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0)
        return [
            [token_id for output in outputs for token_id in output.token_ids] for outputs in self._run(prompts, params)
        ]

    def _run(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> Iterator[list[RequestOutput]]:
        """All outputs of each prompt's request."""
        engine = self._engine
        version = engine.brownout.newest.version + 1
        engine.apply_setting(_pinned(self._level, version))
        outputs: dict[str, list[RequestOutput]] = {str(index): [] for index in range(len(prompts))}
        waiting = iter(outputs)
        limit = engine.config.scheduler.max_num_waiting
        left = len(prompts)
        while left or engine.has_work:
            while left and len(engine.scheduler.waiting) < limit:
                request_id = next(waiting)
                engine.add(GenerationRequest(request_id, prompts[int(request_id)], params))
                left -= 1
            for output in engine.step():
                outputs[output.request_id].append(output)
        yield from outputs.values()


def _pinned(level: int, version: int) -> BrownoutSetting:
    setting = BrownoutSetting.pinned(level, "evaluation")
    return BrownoutSetting(setting.prefill, setting.decode, version=version, reason=setting.reason)


class ServerScorer:
    """An OpenAI-compatible server, at whatever level it is pinned (`brownoutserve brownout set LEVEL`)."""

    def __init__(self, base_url: str, model: str, api_key: str) -> None:
        """``base_url`` without /v1."""
        self._model = model
        headers = {"authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(base_url=base_url.rstrip("/"), timeout=600.0, headers=headers)

    def wait_applied(self, settle_s: float) -> None:
        """Return once every replica follows the newest setting, as far as the server tells, and ``settle_s`` later.
        Raises RuntimeError.
        """
        deadline_s = time.monotonic() + APPLY_TIMEOUT_S
        while (told := self._client.get("/v1/brownout")).status_code in (200, 503):
            status = told.json().get("models", {}).get(self._model, {"replicas": {}})
            versions = [replica["applied_version"] for replica in status["replicas"].values()]
            if versions and set(versions) == {status["version"]}:
                break
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not every replica took the level within {APPLY_TIMEOUT_S:g} s")
            time.sleep(0.1)
        time.sleep(settle_s)

    def score(self, requests: Sequence[Request]) -> list[float]:
        return [sum(token.logprob for token in tokens) for tokens in self.token_scores(requests)]

    def token_scores(self, requests: Sequence[Request]) -> list[list[TokenScore]]:
        def one(request: Request) -> list[TokenScore]:
            body = {"prompt": list(request.ids), "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
            said = self._complete(body)["logprobs"]
            part = slice(request.start, len(request.ids))
            scores = []
            for logprob, token, top in zip(
                said["token_logprobs"][part], said["tokens"][part], said["top_logprobs"][part], strict=True
            ):
                best = max(top, key=lambda name: top[name])
                scores.append(TokenScore(logprob, best == token, best))
            return scores

        with ThreadPoolExecutor(MAX_CLIENTS) as pool:
            return list(pool.map(one, requests))

    def continue_greedily(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int] | list[str]]:
        def one(prompt: tuple[int, ...]) -> list[str]:
            body = {"prompt": list(prompt), "max_tokens": num_tokens, "logprobs": 0, "temperature": 0}
            tokens: list[str] = self._complete(body)["logprobs"]["tokens"]
            return tokens

        with ThreadPoolExecutor(MAX_CLIENTS) as pool:
            return list(pool.map(one, prompts))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self._client.post("/v1/completions", json={"model": self._model, **body})
        if response.is_error:
            raise SystemExit(f"the server answered {response.status_code}: {response.text[:500]}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice
