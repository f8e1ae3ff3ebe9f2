"""A model's tokenizer with its chat templates and end tokens, read from its folder.

mlx-lm loads it. What is added here: templates that have names, the form of calls from the one that
requests with functions are rendered with, and every end token. An adapter's own is read in the same
way, over its base model's files, and must name the base's tokens as the base does; but added ones
may have other names, as trainers give to reserved ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlops.checkpoints import Checkpoint, TokenizerFiles, find_tokenizer_files
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.tokenizer_files import CONFIG, GENERATION_CONFIG
from mlops.engine.chat_template import is_program, render
from mlops.engine.end_tokens import find_end_tokens
from mlops.engine.messages import Tools
from mlops.engine.tokenizer_code import load_without_code, tokenizer_problem
from mlops.errors import MLOpsError, PackagingError

FUNCTION = {"name": "now", "description": "The time", "parameters": {"type": "object"}}
PLAIN: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "Hi"},)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer in memory.

    Attributes:
        tokenizer: mlx-lm's `TokenizerWrapper`; its `eos_token_ids` are all that end an answer.
        warnings: what its user should know, a sentence each.
    """

    tokenizer: Any
    warnings: tuple[str, ...]


def load_tokenizer(checkpoint: Checkpoint) -> LoadedTokenizer:
    """The tokenizer of a language model.

    Raises:
        PackagingError: there is none, or it cannot be read.
    """
    path = checkpoint.path
    if not checkpoint.has_tokenizer:
        raise refusal(
            f"{path} has no tokenizer: put tokenizer.json and tokenizer_config.json beside its "
            "weights",
            path,
            "load_tokenizer",
        )
    files = find_tokenizer_files(path)
    tokenizer = _read(path, path)
    _check_ids(tokenizer, files)
    _complete(tokenizer, files, files)
    return _with_end_tokens(tokenizer, checkpoint, files, files, vocabulary_size(checkpoint.config))


def check_adapter_tokenizer(
    adapter: Checkpoint, base: Checkpoint, base_tokenizer: Any
) -> list[str]:
    """Refuse an adapter whose tokenizer loading would refuse over this base, without either's
    weights. Nothing is read where its folder has no tokenizer, or the base's.

    Args:
        base_tokenizer: as `load_tokenizer` gave it.

    Returns:
        What its user should know, a sentence each.

    Raises:
        PackagingError: the adapter's tokenizer cannot be used.
    """
    files = find_tokenizer_files(adapter.path)
    if not files.adds_to(find_tokenizer_files(base.path)):
        return []
    num_rows = vocabulary_size(base.config)
    return list(load_adapter_tokenizer(files, base, base_tokenizer, num_rows).warnings)


def load_adapter_tokenizer(
    files: TokenizerFiles, base: Checkpoint, base_tokenizer: Any, num_rows: int | None
) -> LoadedTokenizer:
    """The tokenizer of an adapter whose folder has files of one.

    Args:
        base_tokenizer: its base model's, as `load_tokenizer` gave it.
        num_rows: of the base's embedding; None when that is not known.

    Raises:
        PackagingError: it cannot be read, has other ids for the base's tokens, has tokens that
            the base has no rows for, or a template with the old name of one that it renames.
    """
    base_files = find_tokenizer_files(base.path)
    links = {"config.json": base.path / "config.json", **files.over(base_files)}
    with tempfile.TemporaryDirectory(prefix="mlops-tokenizer-") as temporary:
        for name, target in links.items():
            link = Path(temporary, name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(target)
        tokenizer = _read(Path(temporary), files.path)
    _check_ids(tokenizer, files)
    renamed = _find_renamed(tokenizer, base_tokenizer)
    _check_same_tokens(files.path, tokenizer, base_tokenizer, renamed, num_rows)
    _complete(tokenizer, files, base_files, base_tokenizer)
    _check_template(files.path, tokenizer, renamed)
    loaded = _with_end_tokens(tokenizer, base, files, base_files, num_rows)
    if not renamed:
        return loaded
    names = examples([f"{own} for {name}" for name, own in renamed.items()])
    warning = f"{files.path}: its requests have other names for added tokens of the base: {names}"
    return LoadedTokenizer(tokenizer, (*loaded.warnings, warning))


def _read(folder: Path, path: Path) -> Any:
    """What mlx-lm makes of the files in `folder`; messages call it `path`."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = load_without_code(folder)
    except BaseException as exc:  # tokenizers panics with what is no Exception
        if isinstance(exc, KeyboardInterrupt | SystemExit):
            raise
        problem = tokenizer_problem(exc).replace(str(folder), str(path))
        raise refusal(
            f"the tokenizer of {path} cannot be loaded: {problem}", path, "load_tokenizer"
        ) from exc
    if (
        type(tokenizer._tokenizer) is PreTrainedTokenizerFast
        and not (folder / "tokenizer.json").exists()
    ):
        raise refusal(
            f"{path} has no tokenizer.json, and {CONFIG} does not say which class reads its "
            "vocabulary: text would become other tokens than in training; save the tokenizer "
            "again with transformers, which writes tokenizer.json",
            path,
            "load_tokenizer",
        )
    return tokenizer


def _check_ids(tokenizer: Any, files: TokenizerFiles) -> None:
    """Refuse ids that are not kept: the tokenizers library counts added tokens on, without gaps."""
    for added in files.read("tokenizer.json").get("added_tokens") or []:
        content, wanted = added["content"], added["id"]
        number = tokenizer.convert_tokens_to_ids(content)
        if number != wanted:
            raise refusal(
                f"tokenizer.json in {files.path} has the added token {content!r:.40} with the id "
                f"{wanted}, which is read as {number}: there are ids before it without a token; "
                "add tokens for them",
                files.path,
                "load_tokenizer",
                file="tokenizer.json",
            )


def _complete(
    tokenizer: Any, files: TokenizerFiles, base_files: TokenizerFiles, base_tokenizer: Any = None
) -> None:
    """Add a processor's template, or else the base's, and the form of calls of what is rendered."""
    told = files.processor_template
    if told is None:
        told = tokenizer.chat_template
    if told is None and base_tokenizer is not None:
        told = base_tokenizer.chat_template
    named = told if isinstance(told, dict) else {"default": told}
    if told is not None and not all(isinstance(one, str) for one in named.values()):
        raise refusal(
            f"the chat template of {files.path} is no text, and no list of texts with names",
            files.path,
            "load_tokenizer",
        )
    if told is None or (told == tokenizer.chat_template and isinstance(told, str)):
        return
    tokenizer.chat_template = told
    tokenizer.has_chat_template = True
    settings = files if CONFIG in files.files else base_files
    if not settings.read(CONFIG).get("tool_parser_type"):
        _infer_form(tokenizer, named)


def _infer_form(tokenizer: Any, named: Mapping[str, str]) -> None:
    """What mlx-lm does at loading, which looks only at a template that is alone."""
    from mlops.engine.mlx_lm import find_tool_parser, infer_tool_parser

    rendered = named.get("tool_use", named.get("default"))
    asked = SimpleNamespace(chat_template=rendered, get_vocab=tokenizer.get_vocab)
    name = infer_tool_parser(asked)
    parser = None if name is None else find_tool_parser(name)
    tokenizer._tool_parser = parser and parser.parse_tool_call
    tokenizer._tool_call_start = parser and parser.tool_call_start
    tokenizer._tool_call_end = parser and parser.tool_call_end


def _with_end_tokens(
    tokenizer: Any,
    base: Checkpoint,
    files: TokenizerFiles,
    base_files: TokenizerFiles,
    num_rows: int | None,
) -> LoadedTokenizer:
    warnings = []
    try:
        told = files if GENERATION_CONFIG in files.files else base_files
        generation_config = told.read(GENERATION_CONFIG)
    except PackagingError as exc:
        warnings.append(f"it is not used: {exc.message}")
        generation_config = {}
    end_tokens, wrong = find_end_tokens(tokenizer, base.config, generation_config, num_rows)
    tokenizer.eos_token_ids = end_tokens
    warnings += [*wrong, *_try_templates(tokenizer)]
    return LoadedTokenizer(tokenizer, tuple(f"{files.path}: {one}" for one in warnings))


def _try_templates(tokenizer: Any) -> list[str]:
    """What a plain conversation shows: a template with an error in it refuses every one."""
    if not tokenizer.has_chat_template or is_program(tokenizer):
        return []
    warnings = []
    try:
        render(tokenizer, PLAIN)
    except MLOpsError as exc:
        warnings.append(f"a plain conversation cannot be answered, a prompt can: {exc}")
    if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
        try:
            render(tokenizer, PLAIN, Tools(({"type": "function", "function": FUNCTION},)))
        except MLOpsError as exc:
            warnings.append(f"functions cannot be offered in a plain conversation: {exc}")
    return warnings


def _find_renamed(own: Any, base: Any) -> dict[str, str]:
    """The base's added tokens that have another name here, and the same id: old name to new.

    Neither name is one of the other's tokens: nothing has changed places.
    """
    tokens, known, added = own.get_vocab(), base.get_vocab(), own.added_tokens_decoder
    return {
        token.content: added[number].content
        for number, token in base.added_tokens_decoder.items()
        if number in added and token.content not in tokens and added[number].content not in known
    }


def _check_template(path: Path, tokenizer: Any, renamed: Mapping[str, str]) -> None:
    """Refuse a template with the old name of a token: it would be spelled out, letter by letter."""
    told = tokenizer.chat_template or ""
    text = "".join(told.values()) if isinstance(told, dict) else told
    if wrong := [name for name in renamed if name in text]:
        raise refusal(
            f"the adapter {path} has other names for its base model's tokens, and the chat "
            f"template of its requests has the old ones ({examples(wrong)}); add the template that "
            "it was trained with, as chat_template.jinja",
            path,
            "load_tokenizer",
            tokens=wrong[:10],
        )


def _check_same_tokens(
    path: Path, own: Any, base: Any, renamed: Mapping[str, str], num_rows: int | None
) -> None:
    tokens, known = own.get_vocab(), base.get_vocab()
    wrong = [
        token
        for token, number in known.items()
        if tokens.get(token) != number and token not in renamed
    ]
    if wrong:
        raise refusal(
            f"the adapter {path} has another tokenizer than its base model: {len(wrong)} of "
            f"{len(known)} tokens have another id or none ({examples(wrong)}); take the tokenizer "
            "of its training's base model, or remove these files to use the base's",
            path,
            "load_tokenizer",
            tokens=wrong[:10],
        )
    if num_rows is None:
        return
    beyond = [token for token, number in tokens.items() if number >= num_rows]
    if beyond:
        raise refusal(
            f"the adapter {path} adds tokens that its base model has no rows for "
            f"({examples(beyond)}; the embedding has {num_rows}): it would have to be resized; "
            "merge the adapter into its resized base with PEFT and package the result",
            path,
            "load_tokenizer",
            tokens=beyond[:10],
        )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding; None when the config does not say."""
    return find_integer(config, "vocab_size")


def find_integer(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these settings that is a positive number, of the text model's too."""
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, Mapping) else {}):
        for name in names:
            value = settings.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
