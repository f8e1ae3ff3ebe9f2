"""What an operator decides about the HTTP side of a service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class HTTPSettings:
    """Limits, keys and logs; the same under every server. None is no limit.

    Attributes:
        max_body_bytes: the largest request body.
        api_keys: a request must carry one of these; none lets everybody in.
        requests_per_minute: of one key, or of one address where there are no keys.
        max_concurrent_requests: of one key, or of one address where there are no keys.
        cors_origins: web pages of these origins may read the answers; `*` is any.
        allowed_hosts: names in `Host` that the service answers to, `*.` for all below one; none
            leaves it to where it listens (`http.hosts`).
        log_requests: write a line for each request.
        log_prompts: let that line hold the prompt.
        enable_metrics: False makes `/metrics` unknown.
        enable_docs: False makes the page that describes the API unknown.
        enable_runtime_adapters: clients may load and unload adapters.
        adapter_folder: they may do so from below this folder, besides the model store.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    log_requests: bool = True
    log_prompts: bool = False
    enable_metrics: bool = True
    enable_docs: bool = True
    enable_runtime_adapters: bool = False
    adapter_folder: Path | None = None
