"""POST /tokenize and /detokenize: what a prompt costs, with vLLM's bodies and answers."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Request, Response
from pydantic import Field, model_validator

from cluster.ingress.errors import ApiError, Outcome, json_response
from cluster.ingress.openai.body import Body
from cluster.ingress.openai.chat_schemas import ChatBody
from cluster.ingress.openai.jobs import encode, render_chat
from cluster.ingress.openai.schemas import TokenId, parse_body
from cluster.ingress.service import OpenAIService
from cluster.ingress.visit import Visit


class TokenizeBody(Body):
    """A prompt, or a conversation with what shapes its prompt; fields as in /v1/chat/completions."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    messages: list[dict[str, object]] | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, object]] | None = None
    chat_template_kwargs: dict[str, object] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(Outcome.INVALID, "prompt or messages must be given, not both", "prompt")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


def add_routes(api: FastAPI, service: OpenAIService) -> None:
    @api.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await service.answer(request, "tokenize", handle_tokenize)

    @api.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await service.answer(request, "detokenize", handle_detokenize)

    async def handle_tokenize(request: Request, visit: Visit) -> Response:
        headers = await _take_rate(service, visit)
        raw = await service.read_body(request)
        body = parse_body(TokenizeBody, raw)
        model = service.model(body.model, visit.tenant)
        info = await model.backend.info()
        tokenizer = model.tokenizer
        if body.prompt is not None:
            ids = await encode(body.prompt, "prompt", tokenizer, body.add_special_tokens)
        else:
            chat = parse_body(ChatBody, raw, model=model.name)
            ids = await encode(render_chat(chat, tokenizer), "messages", tokenizer, add_special_tokens=False)
        visit.leave(Outcome.OK)
        texts = [tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": info.max_model_len, "tokens": list(ids), "token_strs": texts}
        return json_response(answer, headers=headers)

    async def handle_detokenize(request: Request, visit: Visit) -> Response:
        headers = await _take_rate(service, visit)
        body = parse_body(DetokenizeBody, await service.read_body(request))
        tokenizer = service.model(body.model, visit.tenant).tokenizer
        if body.tokens and max(body.tokens) >= tokenizer.vocab_size:
            raise ApiError(
                Outcome.INVALID,
                f"tokens has {max(body.tokens)}; ids go up to {tokenizer.vocab_size - 1}",
                "tokens",
            )
        visit.leave(Outcome.OK)
        return json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}, headers=headers)


async def _take_rate(service: OpenAIService, visit: Visit) -> dict[str, str]:
    """These cost no engine anything, but they are requests."""
    return {} if service.admission is None else await service.admission.take_rate(visit.tenant)
