"""The quality budget: how much quality a service class may lose, kept over every hour. Pure.

Losses are nats per token, as the model's ladder states them for each level. A class with a budget loses, averaged over
any hour, at most ``mean_loss_nats``, and never more than ``max_loss_nats`` at a time. What was lost is kept by the
minute and comes back an hour later; what is left may be spent within SPEND_S at the earliest, so that a long overload
is met with less and less dimming and not with all of it and then none:

    loss allowed now = min(max_loss_nats, (3600 s * mean_loss_nats - lost in the last hour) / SPEND_S)

| lost in the last hour                  | loss allowed now                                          |
|----------------------------------------|-----------------------------------------------------------|
| nothing                                | max_loss_nats, or 12 * mean_loss_nats if that is less     |
| a share s of the hour's budget         | (1 - s) of that                                           |
| all of it                              | none, until the oldest minute comes back                  |
"""

from __future__ import annotations

from dataclasses import dataclass

HOUR_S = 3600.0
MINUTE_S = 60.0
SPEND_S = 300.0


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """Of one service class. ``mean_loss_nats``: over any hour; ``max_loss_nats``: at any time."""

    mean_loss_nats: float
    max_loss_nats: float = float("inf")

    def __post_init__(self) -> None:
        if not (self.mean_loss_nats >= 0 and self.max_loss_nats >= 0):
            raise ValueError(f"budget {self.mean_loss_nats!r}, {self.max_loss_nats!r}; allowed: 0 nats or more")


@dataclass(frozen=True, slots=True)
class QualityAccount:
    """What one class lost: (start of a minute, nats * seconds lost in it), oldest first, of the last hour."""

    minutes: tuple[tuple[float, float], ...] = ()

    def spend(self, lost_nats_s: float, now_s: float) -> QualityAccount:
        """Book a loss that ends now."""
        kept = tuple(minute for minute in self.minutes if now_s - minute[0] < HOUR_S + MINUTE_S)
        if kept and now_s - kept[-1][0] < MINUTE_S:
            start_s, before = kept[-1]
            return QualityAccount((*kept[:-1], (start_s, before + lost_nats_s)))
        return QualityAccount((*kept, (now_s, lost_nats_s))) if lost_nats_s > 0 else QualityAccount(kept)

    def spent_nats_s(self, now_s: float) -> float:
        """Lost in the last hour; a minute counts until all of it is an hour old."""
        return sum(lost for start_s, lost in self.minutes if now_s - start_s < HOUR_S + MINUTE_S)


def left_frac(budget: QualityBudget, account: QualityAccount, now_s: float) -> float:
    """Share of the hour's budget that is not spent, in [0, 1]."""
    whole = HOUR_S * budget.mean_loss_nats
    return min(max(1 - account.spent_nats_s(now_s) / whole, 0.0), 1.0) if whole > 0 else 0.0


def allowed_loss_nats(budget: QualityBudget, account: QualityAccount, now_s: float) -> float:
    """The most that a token of the class may lose now."""
    left_nats_s = HOUR_S * budget.mean_loss_nats - account.spent_nats_s(now_s)
    return min(budget.max_loss_nats, max(left_nats_s, 0.0) / SPEND_S)
