"""What PUT /v1/brownout takes for an order."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.ingress.admin import PolicyBody
from cluster.ingress.errors import ApiError
from cluster.ingress.openai.schemas import parse_body


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ({"level": 2}, ("static", 2, None)),
        ({"law": "auto"}, ("auto", None, None)),
        ({"law": "static", "level": 0, "model": "small"}, ("static", 0, "small")),
    ],
)
def test_orders(body: dict[str, Any], order: tuple[str, int | None, str | None]) -> None:
    taken = parse_body(PolicyBody, json.dumps(body).encode())
    assert (taken.law, taken.level, taken.model) == order


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "level"),
        ({"law": "static"}, "level"),
        ({"levle": 2}, "levle"),
        ({"level": -1}, "level"),
        ({"law": 2}, "law"),
    ],
)
def test_what_orders_nothing_is_refused(body: dict[str, Any], param: str) -> None:
    """Taken for level 0, a misspelt order would turn dimming off."""
    with pytest.raises(ApiError) as refused:
        parse_body(PolicyBody, json.dumps(body).encode())
    assert refused.value.param == param
