"""The x-ratelimit headers, as OpenAI's clients read them. Pure."""

from __future__ import annotations

from cluster.admission.buckets import Levels, Rates


def rate_headers(rates: Rates, levels: Levels) -> dict[str, str]:
    """Limit, what is left of it, and when the bucket will be full again."""
    headers: dict[str, str] = {}
    for kind, limit, level in (
        ("requests", rates.requests, levels.requests),
        ("tokens", rates.tokens, levels.tokens),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{kind}"] = f"{limit:g}"
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(level)))
            headers[f"x-ratelimit-reset-{kind}"] = duration((limit - level) / limit * 60)
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    return f"{int(seconds) // 60}m{int(seconds) % 60}s"
