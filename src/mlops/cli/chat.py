"""`mlops chat`: a conversation with a running service, in the terminal or from a pipe.

    a line typed -> `/command`, or a message -> /v1/chat/completions -> its text as it comes

The service keeps nothing between two messages: each request has the whole conversation.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from mlops.cli import console
from mlops.cli.arguments import examples
from mlops.cli.asking import (
    DEFAULT_URL,
    ApiKey,
    MaxTokens,
    Service,
    Temperature,
    Timeout,
    Url,
)
from mlops.errors import MLOpsError, ServiceError

EPILOG = examples(
    "mlops chat",
    'mlops chat --adapter formal --system "You answer letters."',
    "mlops chat --url http://10.0.0.5:3000 --max-tokens 1000 < questions.txt",
)
HELP = """/adapter       which adapters there are
/adapter NAME  go on with another one; base is the base model
/reset         forget the conversation
/help          these lines
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer."""

BASE_NAME = "base"


def chat(
    url: Url = DEFAULT_URL,
    adapter: Annotated[
        str | None, typer.Option(help="Name of an adapter; by default the service's.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    timeout: Timeout = 300,
    api_key: ApiKey = None,
) -> None:
    """Hold a conversation with a running service.

    Each line is a message; /help lists the commands. The answers go to standard output.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in options.items() if value is not None}
    conversation = Conversation(Service(url, timeout, api_key), system, given)
    if adapter is not None:
        conversation.choose(adapter)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        _answer_lines(conversation, _lines_of_pipe())


class Conversation:
    """What was said, and who answers.

    Attributes:
        adapter: the name of the adapter that answers; None is the service's own choice.

    Raises:
        ServiceError: no service answers.
    """

    def __init__(self, service: Service, system: str | None, options: dict[str, Any]) -> None:
        self._service = service
        self._options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self._said: list[dict[str, str]] = []
        name = service.get("/health").get("service_name")
        if not isinstance(name, str):
            raise ServiceError(f"what answers at {service.url} is no service to chat with", "chat")
        self.name = name
        self.adapter: str | None = None

    def adapters(self) -> list[str]:
        """Names that `choose` takes, asked now: they may come and go."""
        cards = self._service.get("/v1/models").get("data", [])
        return [*(card["id"] for card in cards if card.get("parent")), BASE_NAME]

    def choose(self, adapter: str) -> None:
        """Let this adapter answer from now on.

        Raises:
            ServiceError: the service has none of this name.
        """
        names = self.adapters()
        if adapter not in names:
            raise ServiceError(
                f"the service has no adapter {adapter!r}; it has {', '.join(names)}", "chat"
            )
        self.adapter = adapter

    @property
    def _model(self) -> str:
        """What the service calls the one that answers; an adapter may have the service's name."""
        if self.adapter is None:
            return self.name
        return BASE_NAME if self.adapter == BASE_NAME else f"{BASE_NAME}:{self.adapter}"

    def forget(self) -> None:
        """Begin anew."""
        self._said.clear()

    def ask(self, text: str) -> None:
        """Print the answer to a message as it comes. Ctrl-C ends it; what has come is kept.

        Raises:
            ServiceError: there was no answer; the message is forgotten.
        """
        message = {"role": "user", "content": text}
        body = {
            "model": self._model,
            "messages": [*self._system, *self._said, message],
            **self._options,
        }
        answer, reason = "", None
        shown = console.StreamedText()
        events = self._service.events("/v1/chat/completions", body)
        try:
            with contextlib.closing(events):
                for event in events:
                    for choice in event.get("choices", ()):
                        reason = choice.get("finish_reason") or reason
                        piece = choice.get("delta", {}).get("content") or ""
                        answer += piece
                        shown.write(piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            reason = "stopped"
        except ServiceError as error:
            if error.details.get("code") == "context_length_exceeded":
                raise ServiceError(f"{error.message}; /reset begins anew", "chat") from error
            raise
        finally:
            shown.close()
        if reason == "stopped":
            console.print_note("stopped")
        elif reason == "length":
            console.print_note("the answer was cut off there; --max-tokens allows longer ones")
        if answer:
            self._said += [message, {"role": "assistant", "content": answer}]


def _talk(conversation: Conversation) -> None:
    """With someone at the keyboard: what goes wrong is told, and the conversation goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets `input` edit its line and recall earlier ones
    console.print_note(f"{conversation.name} at your service; /help lists the commands")
    while True:
        try:
            if not _obey(conversation, _typed(f"{conversation.adapter or ''}> ")):
                return
        except MLOpsError as error:
            console.print_error(str(error))
        except KeyboardInterrupt:
            console.errors().print("\nCtrl-D or /exit leaves")
        except EOFError:
            console.errors().print()
            return


def _answer_lines(conversation: Conversation, lines: Iterable[str]) -> None:
    """From a pipe: what goes wrong ends it."""
    for line in lines:
        if not _obey(conversation, line):
            return


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a line says; False when it ends the conversation."""
    line = line.strip()
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "":
            pass
        case "/exit":
            return False
        case "/help":
            console.errors().print(HELP)
        case "/reset":
            conversation.forget()
        case "/adapter" if rest:
            conversation.choose(rest)
        case "/adapter":
            console.errors().print(", ".join(conversation.adapters()))
        case _ if command.startswith("/"):
            raise ServiceError(
                f"there is no command {command}; /help lists those there are", "chat"
            )
        case _:
            conversation.ask(line)
    return True


def _typed(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    console.errors().print(prompt, end="")  # stdout is for answers
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _lines_of_pipe() -> Iterable[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin
