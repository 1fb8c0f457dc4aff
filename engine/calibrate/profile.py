"""The model's quality profile: every setting that was measured, at every step size. Also what a calibration resumes by.

Pure but for reading and writing its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.calibrate.candidates import StepSize
from engine.moe.ladder import Level
from engine.moe.settings import DimSetting

PROFILE_FILE = "quality_profile.json"


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One setting at one step size."""

    setting: DimSetting
    loss: float  # nats per token more than level 0
    se: float
    kl: float
    experts: float  # distinct, per step and dimmed layer
    exact_experts: float
    step_frac: float | None = None  # step time relative to level 0; None: not timed yet

    @property
    def level(self) -> Level:
        return Level(self.setting, round(self.loss, 5), None if self.step_frac is None else round(self.step_frac, 4))


@dataclass(slots=True)
class QualityProfile:
    """``key`` says what was measured on what: rows of another key are worth nothing here."""

    key: Mapping[str, Any]
    sensitivity: dict[str, float] = field(default_factory=dict)  # "layer/k" |-> loss of that layer alone with k experts
    rows: dict[str, dict[DimSetting, ProfileRow]] = field(default_factory=dict)  # by the size's name

    @staticmethod
    def open(path: Path, key: Mapping[str, Any]) -> QualityProfile:
        """What ``path`` already holds for this key; else an empty profile."""
        try:
            found = read_profile(path)
        except (OSError, ValueError, KeyError, TypeError):
            return QualityProfile(key)
        return found if found.key == json.loads(json.dumps(key)) else QualityProfile(key)

    def of(self, size: StepSize) -> dict[DimSetting, ProfileRow]:
        return self.rows.setdefault(size.name, {})

    def write(self, path: Path) -> None:
        content = {
            "key": self.key,
            "sensitivity": self.sensitivity,
            "rows": {
                name: [
                    asdict(row) | {"setting": row.setting.to_json(), "name": row.setting.name} for row in of.values()
                ]
                for name, of in self.rows.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def read_profile(path: Path) -> QualityProfile:
    """Raises OSError, ValueError, KeyError or TypeError for a file that is none."""
    content = json.loads(path.read_text())
    rows = {name: [_row(row) for row in of_size] for name, of_size in content["rows"].items()}
    by_setting = {name: {row.setting: row for row in of_size} for name, of_size in rows.items()}
    return QualityProfile(content["key"], dict(content["sensitivity"]), by_setting)


def _row(content: dict[str, Any]) -> ProfileRow:
    values = {name: value for name, value in content.items() if name not in ("setting", "name")}
    return ProfileRow(DimSetting.from_json(content["setting"]), **values)
