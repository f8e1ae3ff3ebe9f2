"""Requests to a running service, for `mlops predict` and `mlops chat`; errors as one sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlops.errors import ServiceError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "MLOPS_API_KEY"
DEFAULT_URL = "http://127.0.0.1:3000"

Url = Annotated[str, typer.Option(help="Where the service is.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar=KEY_VARIABLE, help="For a service that wants one.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="The most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=10, help="0 is the likeliest text.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds to wait for the answer.")]

_MAX_FOREIGN = 200
_OPERATION = "predict"


class Service:
    """A service at an address.

    Args:
        url: without a scheme it is http.

    Raises:
        ServiceError: the key cannot be one; and of each method: nothing answers there, it is no
            service of this kind, or it refused. `details` then has its `status`, `type` and `code`.
    """

    def __init__(self, url: str, timeout_s: float, api_key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.timeout_s = timeout_s
        key = (api_key or "").strip()
        if not key.isprintable():  # httpx would show it
            raise self._error("the API key must be one line: several are in it")
        self._headers = {b"Authorization": f"Bearer {key}".encode()} if key else {}

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object."""
        with self._response("GET", path) as response:
            response.read()
            return self._object(response)

    def predict(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of `/predict` in one piece, with its `prediction`."""
        with self._response("POST", "/predict", body) as response:
            response.read()
            answer = self._object(response)
            if "prediction" not in answer:
                raise self._foreign(response, response.text)
            return answer

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The answer's events as they come, up to `[DONE]`."""
        with self._response("POST", path, {**body, "stream": True}) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.read()
                self._object(response)  # raises for what was refused
                raise self._foreign(response, response.text)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                if data == "[DONE]":
                    return
                event = self._parsed(data, response)
                if "error" in event:
                    raise self._refusal(event["error"], response)
                yield event
        raise self._error(f"{self.url} broke off in the middle of its answer")

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[httpx.Response]:
        import httpx

        try:
            # A proxy has no business between this machine and itself.
            local = httpx.URL(self.url).host in {"localhost", "127.0.0.1", "::1"}
            content = None if body is None else json.dumps(body).encode()
            headers = {**self._headers, b"Content-Type": b"application/json"}
            with (
                httpx.Client(timeout=self.timeout_s, trust_env=not local) as client,
                client.stream(
                    method, f"{self.url}{path}", content=content, headers=headers
                ) as response,
            ):
                yield response
        except httpx.ConnectError as exc:
            raise self._error(
                f"no service answers at {self.url}: start one with `mlops serve TARGET`, or give "
                "its address with --url"
            ) from exc
        except httpx.TimeoutException as exc:
            raise self._error(
                f"{self.url} gave no answer within {self.timeout_s:g} s; --timeout waits longer"
            ) from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._error(f"{self.url} cannot be asked: {exc}") from exc

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        answer = self._parsed(response.text, response)
        if "error" in answer and not response.is_success:
            raise self._refusal(answer["error"], response)
        if not response.is_success and "status" not in answer:  # /health of one that is ill
            raise self._foreign(response, response.text)
        return answer

    def _parsed(self, text: str, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise self._foreign(response, text) from exc
        if not isinstance(answer, dict):
            raise self._foreign(response, text)
        return answer

    def _refusal(self, error: Any, response: httpx.Response) -> ServiceError:
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            return self._foreign(response, "")
        reason = error["message"]
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            reason, _, _ = reason.partition(":")
            reason += f": give one of its keys with --api-key or {KEY_VARIABLE}"
        facts = {"status": response.status_code, "type": error.get("type")}
        return self._error(f"the service refused: {reason}", **facts, code=error.get("code"))

    def _foreign(self, response: httpx.Response, text: str) -> ServiceError:
        """What to say of an answer that no service of this toolkit has written.

        Ray Serve's proxy writes some: for a path that is not there, a full queue, a dead replica.
        """
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        is_plain = first.isprintable() and "<" not in first
        told = f": {first[:_MAX_FOREIGN]}" if first and is_plain else ""
        code = response.status_code
        if code == HTTPStatus.TOO_MANY_REQUESTS or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return self._error(f"{self.url} cannot answer now (status {code}){told}")
        return self._error(
            f"what answers at {self.url} is no service of this toolkit (status {code}){told}"
        )

    def _error(self, message: str, **details: Any) -> ServiceError:
        return ServiceError(message, _OPERATION, {"url": self.url, **details})
