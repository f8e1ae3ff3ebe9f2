"""A request for an adapter of another replica, as the replica that it reached sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray_handles import START, WHOLE, Call, Handle, Message, body
from starlette.requests import Request

from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.paths import is_handed_over
from mlops.serving.http.records import RequestRecord
from mlops.serving.ray.affinity import Owners
from mlops.serving.ray.handover import Handover, answer

ADAPTERS = tuple(f"adapter-{number}" for number in range(8))
OWNERS = Owners(adapters=ADAPTERS, replicas=("here", "there"))
MINE = next(one for one in ADAPTERS if OWNERS.of(one) == "here")
THEIRS = next(one for one in ADAPTERS if OWNERS.of(one) == "there")
INFO = ServiceInfo("my_service", model="models/tiny", model_tag="tiny:1.0.0")
UNAVAILABLE = ActorUnavailableError("the network", None)
BUSY = BackPressureError(num_queued_requests=8, max_queued_requests=8)


class NamingRunner:
    """Answers with the adapter that was asked for, and where it was answered."""

    is_loaded = False

    def __init__(self, place: str) -> None:
        self.place = place

    def load_model(self) -> None:
        self.is_loaded = True

    def predict(self, input_data: Any) -> Any:
        return {"prediction": [self.place, input_data], "mlx_optimized": False}

    def predict_batch(self, inputs: Any) -> Any:
        return [self.predict(one) for one in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {}

    def unload_model(self) -> None: ...


class Replica:
    """One that is asked over HTTP, with a handle on the others."""

    def __init__(self, name: str, handle: Handle, *, max_at_once: int = 4) -> None:
        self.host = RunnerHost(lambda: NamingRunner(name))  # type: ignore[arg-type, return-value]
        self.served = Served(self.host, INFO)
        self.handle = handle
        self.served.elsewhere = Handover(handle, self.served, OWNERS, name, max_at_once)
        self.app: Any = create_app(self.served)

    async def ask(
        self,
        fields: dict[str, Any],
        path: str = "/predict",
        on_message: Callable[[Message], None] = lambda _: None,
    ) -> list[Message]:
        """What a client that stays is sent; `on_message` is told of each piece as it comes."""
        sent: list[Message] = []
        content = json.dumps(fields).encode()
        unread = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            return unread.pop() if unread else await asyncio.Event().wait()

        async def send(message: Message) -> None:
            sent.append(message)
            on_message(message)

        await self.app(scope_of(path), receive, send)
        return sent

    async def place_of(self, fields: dict[str, Any], path: str = "/predict") -> str:
        """Which replica answered."""
        (start, *rest) = await self.ask(fields, path)
        if start["status"] == START["status"]:
            return "there"
        assert start["status"] == 200, rest
        place: str = json.loads(rest[0]["body"])["prediction"][0]
        return place


def scope_of(path: str = "/predict") -> dict[str, Any]:
    return {
        **{"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "root_path": "", "query_string": b"", "client": ("192.0.2.7", 5)},
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"x-request-id", b"id-1"),
        ],
    }


@contextmanager
def replica(*pieces: Any, name: str = "here", **options: Any) -> Iterator[Replica]:
    """One whose handle answers with the pieces."""
    one = Replica(name, Handle(pieces or WHOLE), **options)
    one.host.start()
    try:
        yield one
    finally:
        one.host.stop()


def run(scenario: Any) -> Any:
    """Run it; nothing of it goes on afterwards, and nothing takes for ever."""

    async def watched() -> Any:
        async with asyncio.timeout(30):
            result = await scenario
        for _ in range(3):  # what was cancelled needs its turn to end
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(watched())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# Which requests are sent on.


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": MINE},
        {"adapter": "unknown"},
        {"adapter": None},
        {"adapter": "base"},
        {"adapter": [THEIRS]},
        {"adapter": 5},
        {"model": THEIRS},  # no field of this route
        {},
    ],
)
def test_what_is_no_other_replicas_is_answered_here(fields: dict[str, Any]) -> None:
    with replica() as here:
        assert run(here.place_of({"text": "a", **fields})) == "here"
        assert not here.handle.calls
        assert here.served.requests_by_status == {200: 1}


@pytest.mark.parametrize(
    "model",
    [MINE, "unknown", "my_service", "models/tiny", "tiny:1.0.0", "tiny", "base", f"base:{MINE}", 5],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_models_that_are_no_other_replicas_are_asked_here(path: str, model: Any) -> None:
    with replica() as here:
        run(here.ask({"model": model, "adapter": THEIRS}, path))
        assert not here.handle.calls


@pytest.mark.parametrize(
    "model", [THEIRS, f"base:{THEIRS}", f"my_service:{THEIRS}", f"tiny:1.0.0:{THEIRS}"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_an_adapter_has_several_names_as_a_model(path: str, model: str) -> None:
    with replica() as here:
        assert run(here.place_of({"model": model, "prompt": "a"}, path)) == "there"
        (call,) = here.handle.calls
        assert call.options["multiplexed_model_id"] == THEIRS
        assert json.loads(call.body) == {"model": model, "prompt": "a"}


def test_while_no_other_replica_is_known_all_is_answered_here() -> None:
    with replica() as here:
        for replicas in ((), ("here",)):
            owners = Owners(adapters=ADAPTERS, replicas=replicas)
            here.served.elsewhere = Handover(
                here.handle,  # type: ignore[arg-type]
                here.served,
                owners,
                "here",
                4,
            )
            assert run(here.place_of({"adapter": THEIRS})) == "here"
        assert not here.handle.calls


def test_behind_a_prefix_the_route_is_known() -> None:
    with replica() as here:
        scope = {**scope_of("/support-chat/predict"), "root_path": "/support-chat"}
        assert run(asked(here, scope, {"adapter": THEIRS})) is not None
        assert run(asked(here, scope, {"model": THEIRS})) is None


async def asked(here: Replica, scope: dict[str, Any], fields: dict[str, Any]) -> Any:
    """What the endpoint is told; whatever was begun is given up."""
    assert here.served.elsewhere is not None
    response = await here.served.elsewhere(Request(scope), fields)
    if response is not None:

        async def gone(_: Any) -> None:
            raise OSError("the client has left")

        with pytest.raises(OSError, match="has left"):
            await response(scope, None, gone)  # type: ignore[arg-type]
    return response


# What comes back.


def test_the_others_answer_is_passed_on_as_it_comes() -> None:
    async def scenario(here: Replica, gate: asyncio.Event) -> list[Message]:
        seen: list[Message] = []

        def see(message: Message) -> None:
            seen.append(message)
            if len(seen) == 2:
                gate.set()  # the rest comes only when this has come

        return await here.ask({"text": "ä", "adapter": THEIRS}, on_message=see)

    gate = asyncio.Event()
    with replica([START, body("Hel")], gate, [body("l")], [body("o", more=False)]) as here:
        start, *rest = run(scenario(here, gate))
        assert start["status"] == 201
        assert (b"x-from", b"there") in start["headers"]
        assert (b"content-type", b"text/plain") in start["headers"]
        assert rest == [body("Hel"), body("l"), body("o", more=False)]
        assert not here.served.requests_by_status  # the other one counts it
        (call,) = here.handle.calls
        assert call.options == {
            "stream": True,
            "method_name": "answer",
            "multiplexed_model_id": THEIRS,
        }
        assert is_handed_over(call.scope)
        assert json.loads(call.body) == {"text": "ä", "adapter": THEIRS}


def test_a_request_and_its_answer_are_the_same_through_another_replica() -> None:
    fields = {
        "adapter": THEIRS,
        "text": "ä😀\u2028\x7f\\",
        "big": 10**4299,
        "numbers": [0.1, 1e-300, -1, 1.0, True, None],
        "deep": [[[[{"a": {}}]]]],
    }

    with replica(name="there") as there:

        def answer_there(scope: dict[str, Any], content: bytes) -> AsyncIterator[list[Message]]:
            return answer(there.app, scope, content)  # type: ignore[arg-type, return-value]

        with replica() as here:
            here.handle.answer = answer_there
            start, *rest = run(here.ask(fields))
        assert start["status"] == 200
        assert json.loads(b"".join(one["body"] for one in rest))["prediction"] == ["there", fields]
        assert there.served.requests_by_status == {200: 1}
        assert not here.served.requests_by_status
        assert not there.handle.calls


def test_an_error_of_the_other_replica_is_the_answer() -> None:
    with replica(name="there") as there:
        there.host.stop()

        def answer_there(scope: dict[str, Any], content: bytes) -> AsyncIterator[list[Message]]:
            return answer(there.app, scope, content)  # type: ignore[arg-type, return-value]

        with replica() as here:
            here.handle.answer = answer_there
            start, *_ = run(here.ask({"adapter": THEIRS}))
        assert start["status"] == 503
        assert there.served.requests_by_status == {503: 1}


# What goes wrong.


@pytest.mark.parametrize(
    "failure",
    [ActorDiedError(), UNAVAILABLE, BUSY, RayServeException("it failed to deploy")],
    ids=lambda one: type(one).__name__,
)
def test_as_long_as_nothing_has_come_it_can_be_answered_here(failure: Exception) -> None:
    with replica(failure) as here:
        assert run(here.place_of({"adapter": THEIRS})) == "here"
        assert len(here.handle.calls) == 1
        assert here.served.requests_by_status == {200: 1}


def test_another_replica_that_says_nothing_is_not_waited_for() -> None:
    with replica() as here:
        here.handle.pieces = ()
        assert run(here.place_of({"adapter": THEIRS})) == "here"


def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    async def scenario(here: Replica) -> list[Message]:
        sent: list[Message] = []
        with pytest.raises(ActorDiedError):
            await here.ask({"adapter": THEIRS}, on_message=sent.append)
        return sent

    with replica([START, body("Hel")], ActorDiedError()) as here:
        start, last = run(scenario(here))
        assert start["status"] == 201
        assert last == body("Hel")


def test_an_answer_that_breaks_off_is_counted_where_somebody_is_left_to_count() -> None:
    async def scenario(here: Replica) -> None:
        with pytest.raises(ActorDiedError):
            await here.ask({"adapter": THEIRS})

    with replica([START, body("Hel")], ActorDiedError()) as here:
        run(scenario(here))
        assert here.served.requests_by_status == {500: 1}


def test_what_is_too_much_at_once_is_answered_here() -> None:
    async def scenario(here: Replica, gate: asyncio.Event) -> None:
        begun = asyncio.Event()

        async def first() -> list[Message]:
            return await here.ask({"adapter": THEIRS}, on_message=lambda _: begun.set())

        under_way = [asyncio.create_task(first()) for _ in range(2)]
        await begun.wait()
        await until(lambda: len(here.handle.calls) == 2)
        assert await here.place_of({"adapter": THEIRS}) == "here"
        gate.set()
        for sent in await asyncio.gather(*under_way):
            assert sent[0]["status"] == 201
        assert await here.place_of({"adapter": THEIRS}) == "there"

    gate = asyncio.Event()
    with replica([START], gate, [body("", more=False)], max_at_once=2) as here:
        run(scenario(here, gate))


async def to_the_end(here: Replica) -> None:
    await here.ask({"adapter": THEIRS})


async def client_leaves(here: Replica) -> None:
    """As Ray tells: what answers it is cancelled."""
    asking = asyncio.create_task(here.ask({"adapter": THEIRS}))
    await until(lambda: here.handle.calls)
    for _ in range(20):  # for the first piece of the answer, where there is one
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])


async def connection_breaks(here: Replica) -> None:
    def broken(_: Message) -> None:
        raise OSError("the connection is gone")

    with pytest.raises(OSError, match="is gone"):
        await here.ask({"adapter": THEIRS}, on_message=broken)


async def raises(here: Replica) -> None:
    with pytest.raises((ActorDiedError, ValueError)):
        await here.ask({"adapter": THEIRS})


NEVER = asyncio.Event()


@pytest.mark.parametrize(
    ("pieces", "ending"),
    [
        (WHOLE, to_the_end),
        ((), to_the_end),
        ((ActorDiedError(),), to_the_end),
        ((BUSY,), to_the_end),
        ((RayServeException("no"),), to_the_end),
        ((ValueError("not Ray's"),), to_the_end),
        (([START], ActorDiedError()), raises),
        (([START], ValueError("not Ray's")), raises),
        ((NEVER,), client_leaves),
        (([START], NEVER), client_leaves),
        (([START, body("a")], NEVER), client_leaves),
        (WHOLE, connection_breaks),
    ],
)
def test_however_a_request_ends_another_can_be_sent_on(pieces: Any, ending: Any) -> None:
    async def scenario(here: Replica) -> None:
        here.handle.pieces = pieces
        for _ in range(3):
            await ending(here)
        here.handle.pieces = WHOLE
        assert await here.place_of({"adapter": THEIRS}) == "there"

    with replica(max_at_once=1) as here:
        run(scenario(here))
        assert len(here.handle.calls) == 4
        assert all(call.is_cancelled for call in here.handle.calls)  # ended, for Ray


@pytest.mark.parametrize("pieces", [(NEVER,), ([START], NEVER)])
def test_the_other_replica_is_told_when_the_client_leaves(pieces: Any) -> None:
    async def scenario(here: Replica) -> Call:
        await client_leaves(here)
        return here.handle.calls[0]

    with replica(*pieces) as here:
        assert run(scenario(here)).is_cancelled


def test_a_request_that_is_answered_elsewhere_is_marked_so() -> None:
    with replica() as here:
        for adapter, is_elsewhere in ((THEIRS, True), (MINE, False)):
            record, scope = RequestRecord("id-1"), scope_of()
            record.put_into(scope)
            run(asked(here, scope, {"adapter": adapter}))
            assert record.is_elsewhere is is_elsewhere
