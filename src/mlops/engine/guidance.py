"""Answers of a given form: which tokens a grammar allows next.

    JSON schema or Lark grammar -> compiled, once each -> a `Guide` for each generation
    -> the tokens that it allows, for all rows of a batch -> sampling

llguidance (github.com/guidance-ai/llguidance) keeps the state of a parser for every guide and walks
the vocabulary with it. All of that happens on the host, while the device computes the logits.

Clients send the schemas, so a grammar is first compiled in another process, which may be killed
(`grammar_trial`). What it may cost later, at every token, is limited by llguidance itself.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlops.engine.helper_process import HelperProcess
from mlops.engine.response_format import FIELD, JSON_LAYOUT
from mlops.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

MAX_COMPILED = 16
"""Grammars that are kept compiled: clients send the same one again and again."""

TRIAL_S = 0.5
"""A grammar must be compiled in this time; 1 to 10 ms are usual."""

BITS_PER_WORD = 32
MAX_REASON_CHARACTERS = 200
NOT_VERBOSE = "<non-verbose/>"

MAX_LEXER_STATES = 50_000
"""Of one guide: 1 to 2 KB each. llguidance's own limit is 250,000."""

STEP_LEXER_FUEL = 100_000
"""Of one token of one guide: about 7 ms. llguidance's own limit is 200,000."""


def json_grammar(schema: str) -> str:
    """The grammar of JSON that follows a schema, on one line (`JSON_LAYOUT`).

    Raises:
        InvalidRequestError: the schema, as JSON, cannot be read.
    """
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_LAYOUT)
    except ValueError as exc:
        raise _refuse(FIELD, str(exc)) from exc


def lark_grammar(text: str) -> str:
    """The grammar of a text in llguidance's variant of Lark; `Guidance.compile` checks it.

    For JSON inside it, `%json` and a schema with `"x-guidance"`: `JSON_LAYOUT`.
    """
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


@dataclass(frozen=True)
class _Vocabulary:
    """What guides need of a tokenizer.

    Attributes:
        num_tokens: the model may have more logits, or fewer.
        plain_end_tokens: end tokens that are text to the tokenizer, which would be allowed wherever
            their text is; int64.
    """

    tokenizer: LLTokenizer
    num_tokens: int
    plain_end_tokens: NDArray[np.int64]


class Guidance:
    """The grammars of one model's requests. Any thread may use it.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`. It is read for the first grammar, which takes a
            second when the vocabulary is large.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._source = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._trials = HelperProcess("grammar_trial.py")
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, grammar: str, field: str = FIELD) -> None:
        """Make a grammar ready, or find out that it cannot be used; takes a second at most.

        Args:
            field: of the request that brought it, for the message.

        Raises:
            InvalidRequestError: it is no grammar, too complex, nothing follows it, or the model's
                tokenizer is not one that grammars work with.
        """
        with self._lock:
            self._find(grammar, field)

    def start(self, grammar: str) -> Guide:
        """A guide at the beginning of a generation.

        Raises:
            InvalidRequestError: as `compile` does.
        """
        with self._lock:
            matcher = self._find(grammar, FIELD).deep_copy()
            return Guide(matcher, self._read_vocabulary(FIELD))

    def _find(self, grammar: str, field: str) -> LLMatcher:
        vocabulary = self._read_vocabulary(field)
        if grammar not in self._compiled:
            if self._trials.ask(json.dumps(grammar).encode("ascii"), TRIAL_S) is None:
                raise _refuse(field, "it is too complex")
            self._compiled[grammar] = _compile(vocabulary.tokenizer, grammar, field)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]

    def _read_vocabulary(self, field: str) -> _Vocabulary:
        if self._vocabulary is None:
            from llguidance.hf import from_tokenizer

            end_tokens = sorted(self._source.eos_token_ids)
            try:
                made = from_tokenizer(self._source._tokenizer, eos_token=end_tokens)
            except Exception as exc:  # of any kind: it reads the checkpoint's own tokenizer
                raise InvalidRequestError(
                    f"{field} cannot be used with this model: grammars do not work with its "
                    f"tokenizer ({shorten(str(exc))})",
                    field,
                ) from exc
            plain = [token for token in end_tokens if not made.is_special_token(token)]
            self._vocabulary = _Vocabulary(made, made.vocab_size, np.array(plain, dtype=np.int64))
        return self._vocabulary


class Guide:
    """Where one generation stands in its grammar. Use it in one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self.matcher = matcher
        self.vocabulary = vocabulary

    def advance(self, token: int) -> bool:
        """Take the next token, an end token too; True when nothing but an end token may follow.

        Raises:
            InvalidRequestError: the grammar does not allow it, or following it costs too much,
                which shows at some token only.
        """
        # One that has failed still takes end tokens.
        if not self.matcher.consume_token(token) or self.matcher.is_error():
            reason = shorten(self.matcher.get_error())
            raise InvalidRequestError(
                f"{FIELD} or tools cannot be used: the answer cannot follow its grammar any "
                f"further: {reason}",
                FIELD,
            )
        return self.matcher.is_stopped()


def allowed_tokens(guides: Sequence[Guide | None], vocabulary_size: int) -> NDArray[np.bool_]:
    """What each row may draw next, (rows, vocabulary_size); None is a row that may draw anything.

    A guide that fails here allows end tokens only, and `advance` then raises. The guides are of one
    model, whose adapters may have tokenizers of their own. Other threads run meanwhile.
    """
    allowed = np.ones((len(guides), vocabulary_size), dtype=np.bool_)
    by_vocabulary: dict[int, list[tuple[int, Guide]]] = {}
    for row, guide in enumerate(guides):
        if guide is not None:
            by_vocabulary.setdefault(id(guide.vocabulary), []).append((row, guide))
    for guided in by_vocabulary.values():
        of_rows = _allowed_of([guide for _, guide in guided], vocabulary_size)
        allowed[[row for row, _ in guided]] = of_rows
    return allowed


def _allowed_of(guides: Sequence[Guide], vocabulary_size: int) -> NDArray[np.bool_]:
    """The same for guides of one tokenizer."""
    from llguidance.numpy import fill_next_token_bitmask_par

    vocabulary = guides[0].vocabulary
    num_words = -(-vocabulary.num_tokens // BITS_PER_WORD)
    masks = np.zeros((len(guides), num_words), dtype=np.int32)
    matchers = [(guide.matcher, row) for row, guide in enumerate(guides)]
    fill_next_token_bitmask_par(_executor(), matchers, masks)
    # A model's logits beyond its tokenizer's tokens are filled up with zeros.
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocabulary_size, bitorder="little")
    allowed = bits.view(np.bool_)
    if vocabulary.plain_end_tokens.size:
        for row, guide in enumerate(guides):
            if not guide.matcher.is_accepting():
                allowed[row, vocabulary.plain_end_tokens] = False
    return allowed


def _compile(tokenizer: LLTokenizer, grammar: str, field: str) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if not matcher.is_error():
        # Some errors show at the first token only. The copy keeps what the first token cost.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _refuse(field, matcher.get_error())
    return matcher


@functools.cache
def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, step_lexer_fuel=STEP_LEXER_FUEL, verbose_errors=False
    )


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


def _refuse(field: str, reason: str) -> InvalidRequestError:
    reason = shorten(reason)
    if reason.startswith("NoExtension"):
        reason = "nothing follows it"
    return InvalidRequestError(f"{field} cannot be used: {reason}", field)


def shorten(reason: str) -> str:
    """Another library's reason on one line."""
    reason = " ".join(reason.replace(NOT_VERBOSE, " ").split())
    return reason if len(reason) <= MAX_REASON_CHARACTERS else reason[:MAX_REASON_CHARACTERS] + "…"
