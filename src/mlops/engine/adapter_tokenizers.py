"""The tokenizers of adapters that have one of their own: read when needed, shared, few kept.

    an adapter's folder -> its tokenizer's files, None where they are the base's -> the model as its
    requests see it

Adapters of one training have the same files, so hundreds of them share one tokenizer. One of
130,000 tokens takes seconds and 40 MB, so it is read in the thread that needs it, and those that
were used last are kept.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property

from mlops.checkpoints import Checkpoint, TokenizerFiles, find_tokenizer_files
from mlops.engine.loading import LoadedModel
from mlops.engine.owner import to_exception
from mlops.engine.tokenization import load_adapter_tokenizer

logger = logging.getLogger(__name__)

MAX_KEPT = 8


class AdapterTokenizers:
    """The tokenizers of one model's adapters. Any thread may ask.

    Args:
        loaded: the base model with its own tokenizer.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._models: OrderedDict[str, Future[LoadedModel]] = OrderedDict()

    @cached_property
    def _base(self) -> TokenizerFiles:
        return find_tokenizer_files(self._loaded.checkpoint.path)

    def files_of(self, adapter: Checkpoint) -> TokenizerFiles | None:
        """The files that make its tokenizer another than the base's; None when there are none.

        Raises:
            PackagingError: they cannot be used.
        """
        files = find_tokenizer_files(adapter.path)
        return files if files.files and files.adds_to(self._base) else None

    def has(self, files: TokenizerFiles) -> bool:
        """Whether it is in memory; otherwise `model_for` takes a second."""
        with self._lock:
            found = self._models.get(files.digest)
        return found is not None and found.done()

    def verifying(
        self, files: TokenizerFiles, verify: Callable[[], None] | None
    ) -> Callable[[], None]:
        """What `verify` does, and that the tokenizer can be used; it is in memory then."""

        def verify_both() -> None:
            if verify is not None:
                verify()
            self.model_for(files)

        return verify_both

    def model_for(self, files: TokenizerFiles) -> LoadedModel:
        """The model with this tokenizer in place of its own; reads it unless it is in memory.

        Raises:
            PackagingError: it cannot be used with this model.
        """
        key = files.digest
        with self._lock:
            found = self._models.get(key)
            is_new = found is None
            if found is None:
                found = self._models[key] = Future()
                while len(self._models) > MAX_KEPT:
                    self._models.popitem(last=False)
            self._models.move_to_end(key)
        if is_new:
            try:
                found.set_result(self._read(files))
            except BaseException as exc:
                with self._lock:
                    self._models.pop(key, None)
                found.set_exception(to_exception(exc))
        return found.result()

    def _read(self, files: TokenizerFiles) -> LoadedModel:
        loaded = self._loaded
        read = load_adapter_tokenizer(
            files,
            loaded.checkpoint,
            loaded.tokenizer,
            loaded.vocabulary_size or loaded.trial.num_logits,
        )
        for warning in read.warnings:
            logger.warning("%s", warning)
        return loaded.with_tokenizer(read.tokenizer)
