"""`BentoMLConfig.http`: who may ask, how much, and what is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlops.serving.bentoml import config_values as allow
from mlops.serving.bentoml.config_values import CheckedFields, Rule

if TYPE_CHECKING:
    from mlops.serving.http import HTTPSettings


class LogFormat(StrEnum):
    """How the log of a service is written."""

    TEXT = "text"
    JSON = "json"


@dataclass(kw_only=True)
class HTTPOptions(CheckedFields):
    """The HTTP side of a service. Keys come from here by file or from `MLOPS_API_KEYS` alone.

    Attributes:
        max_body_bytes: the largest request body; a larger one is answered with 413.
        max_prompt_tokens: the longest prompt; None leaves it to the model's context.
        api_key_file: a file with one key on each line, any of which a request must carry.
        requests_per_minute: of one key, or of one address where there are no keys; above it 429.
        max_concurrent_requests: the same, of requests that are answered at one time.
        cors_origins: web pages of these origins may read the answers; `*` is any.
        allowed_hosts: names that the service is reached by, such as "models.example.com" or
            "*.example.com"; requests for others get 421. Without any, a service without keys that
            listens on 127.0.0.1 answers to this machine's own names, and others to every name.
        log_requests: write a line for each request: id, route, status, adapter, tokens, times.
        log_prompts: let that line hold what was asked.
        log_format: "text", or "json" with one object on each line.
        enable_runtime_adapters: clients may load and unload adapters; needs `workers` to be 1.
        adapter_folder: they may load from below this folder, besides the model store.
        shutdown_delay: seconds between SIGTERM, when `/readyz` says no, and the end of listening.
        shutdown_timeout: seconds that running requests then have to finish.

    Raises:
        ConfigError: a field is unknown or holds what it may not.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    max_prompt_tokens: int | None = None
    api_key_file: str | None = None
    requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    log_requests: bool = True
    log_prompts: bool = False
    log_format: LogFormat | str = LogFormat.TEXT
    enable_runtime_adapters: bool = False
    adapter_folder: str | None = None
    shutdown_delay: float = 0
    shutdown_timeout: float = 30

    _rules: ClassVar[Mapping[str, Rule]] = {
        "max_body_bytes": allow.whole_number(1024, 1 << 30),
        "max_prompt_tokens": allow.optional(allow.whole_number(1, 1 << 30)),
        "api_key_file": allow.optional(allow.path()),
        "requests_per_minute": allow.optional(allow.whole_number(1, 1_000_000)),
        "max_concurrent_requests": allow.optional(allow.whole_number(1, 100_000)),
        "cors_origins": allow.origins(),
        "allowed_hosts": allow.host_names(),
        "log_requests": allow.flag(),
        "log_prompts": allow.flag(),
        "log_format": allow.choice(LogFormat),
        "enable_runtime_adapters": allow.flag(),
        "adapter_folder": allow.optional(allow.path()),
        "shutdown_delay": allow.number_from_0(3600),
        "shutdown_timeout": allow.number_from_0(86_400),
    }

    def to_settings(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        enable_metrics: bool = True,
        enable_docs: bool = True,
    ) -> HTTPSettings:
        """What the app is told; reads the keys.

        Raises:
            ConfigError: the file with the keys cannot be read or holds what is no key.
        """
        from mlops.serving.http import HTTPSettings
        from mlops.serving.http.access import read_api_keys

        return HTTPSettings(
            max_body_bytes=self.max_body_bytes,
            api_keys=read_api_keys(self.api_key_file, environ),
            requests_per_minute=self.requests_per_minute,
            max_concurrent_requests=self.max_concurrent_requests,
            cors_origins=self.cors_origins,
            allowed_hosts=self.allowed_hosts,
            log_requests=self.log_requests,
            log_prompts=self.log_prompts,
            enable_metrics=enable_metrics,
            enable_docs=enable_docs,
            enable_runtime_adapters=self.enable_runtime_adapters,
            adapter_folder=Path(self.adapter_folder) if self.adapter_folder else None,
        )
