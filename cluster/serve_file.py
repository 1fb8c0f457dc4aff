"""Serve's YAML files: read one, check both Ray's part and ours, find the application in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.config import ClusterConfig, ClusterConfigError, describe, parse_models

IMPORT_PATH = "cluster.app:build"
DEFAULT_HTTP_PORT = 8000


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A checked file. ``document`` is what ``serve deploy`` would send."""

    document: dict[str, Any]
    app_name: str
    configs: tuple[ClusterConfig, ...]  # one for each model

    @property
    def config(self) -> ClusterConfig:
        """Of the first or only model."""
        return self.configs[0]

    @property
    def num_replicas(self) -> int:
        """Engine replicas of all models."""
        return sum(config.replicas for config in self.configs)

    @property
    def http_port(self) -> int:
        port: int = (self.document.get("http_options") or {}).get("port", DEFAULT_HTTP_PORT)
        return port

    def on(self, host: str, port: int) -> ServeFile:
        """The same applications behind another address."""
        options = {**(self.document.get("http_options") or {}), "host": host, "port": port}
        return ServeFile({**self.document, "http_options": options}, self.app_name, self.configs)


def load_serve_file(path: str | Path) -> ServeFile:
    """Raises ClusterConfigError with one sentence that names the file and the key."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClusterConfigError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ClusterConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_serve_document(document)
    except ClusterConfigError as error:
        raise ClusterConfigError(f"{path}: {error}") from error


def parse_serve_document(document: Any) -> ServeFile:
    """Raises ClusterConfigError."""
    if not isinstance(document, dict):
        raise ClusterConfigError("the file must hold a mapping with the key applications")
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise ClusterConfigError(describe(error)) from error
    except ValueError as error:
        raise ClusterConfigError(" ".join(str(error).split())) from error
    _refuse_unknown_keys(document, ServeDeploySchema, "")
    for app in document["applications"]:
        _refuse_unknown_keys(app, ServeApplicationSchema, "applications.")
    ours = [app for app in document["applications"] if app.get("import_path") == IMPORT_PATH]
    if not ours:
        paths = [app.get("import_path") for app in document["applications"]]
        raise ClusterConfigError(f"applications.import_path is {paths!r}; allowed: {IMPORT_PATH}")
    return ServeFile(document, ours[0].get("name", "default"), parse_models(ours[0].get("args") or {}))


def _refuse_unknown_keys(section: dict[str, Any], schema: type[BaseModel], prefix: str) -> None:
    """Ray accepts keys that it does not know; a misspelt one would be ignored without a word."""
    for key, value in section.items():
        if key not in schema.model_fields:
            known = ", ".join(schema.model_fields)
            raise ClusterConfigError(f"{prefix}{key} is {value!r}; allowed: no such key, one of {known}")
