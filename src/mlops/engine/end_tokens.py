"""Which tokens end an answer: all that a checkpoint says, wherever it says it.

`config.json` and `generation_config.json` may each have one or several, and the tokenizer has one.
Files that were changed by different tools disagree, and an answer that runs on past its end is
worse than one end token too many: so all of them count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlops.engine.chat_template import is_program, render
from mlops.errors import MLOpsError

FIELD = "eos_token_id"
ANSWER = "Zq7"
"""What the probe's assistant says: no template has such a text of its own."""

PROBE: Sequence[Mapping[str, Any]] = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": ANSWER},
)


def find_end_tokens(
    tokenizer: Any,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    num_rows: int | None,
) -> tuple[set[int], list[str]]:
    """The ids of all end tokens, and what is wrong with what the files say of them.

    Where the chat template ends every answer with an added token, and not with one of these, it
    counts too: the model was trained to end with it, and would go on with the next turn.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, as it was loaded.
        config, generation_config: content of these files; the latter is {} when there is none.
        num_rows: of the embedding; None when that is not known.

    Returns:
        The ids, and a sentence for each that cannot be used.
    """
    found, warnings = set(tokenizer.eos_token_ids), []
    text_config = config.get("text_config")
    sources = {
        "config.json": config,
        "text_config in config.json": text_config if isinstance(text_config, Mapping) else {},
        "generation_config.json": generation_config,
    }
    for name, settings in sources.items():
        for value in _listed(settings.get(FIELD)):
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                found.add(value)
            else:
                warnings.append(f"{FIELD} of {name} has {value!r:.40}, which is no token id")
    beyond = sorted(one for one in found if num_rows is not None and one >= num_rows)
    if beyond:
        warnings.append(
            f"the end tokens {', '.join(map(str, beyond[:5]))} are none of the model's {num_rows} "
            "tokens: they end no answer"
        )
    found -= set(beyond)
    turn_end = _find_turn_end(tokenizer, found)
    if turn_end is not None and (num_rows is None or turn_end < num_rows):
        found.add(turn_end)
        warnings.append(
            f"the chat template ends an answer with {tokenizer.convert_ids_to_tokens(turn_end)}, "
            f"which no {FIELD} names: it ends answers here too"
        )
    if not found:
        warnings.append(
            f"no {FIELD} says which token ends an answer: each goes on until max_tokens"
        )
    return found, warnings


def _listed(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list) else (value,)


def _find_turn_end(tokenizer: Any, known: set[int]) -> int | None:
    """The added token that the chat template writes after an answer, unless it writes a known one.

    Some templates end the last answer in another way than those before, which says nothing: gpt-oss
    has an end token for the former, and one that ends a thought, too, for the latter.
    """
    if not tokenizer.has_chat_template or is_program(tokenizer):
        return None
    try:
        last = render(tokenizer, PROBE, begins_answer=False)
        followed = render(tokenizer, (*PROBE, PROBE[0]))
    except MLOpsError:  # it takes no such conversation
        return None
    last, followed = last.partition(ANSWER)[2], followed.partition(ANSWER)[2]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, followed, strict=False))
    turn_end = "".join(character for character, _ in same)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    found: list[int] = []
    while at_begin := [one for one in added if one and turn_end.lstrip().startswith(one)]:
        token = max(at_begin, key=len)
        turn_end = turn_end.lstrip().removeprefix(token)
        found.append(added[token])
    return found[0] if found and known.isdisjoint(found) else None
