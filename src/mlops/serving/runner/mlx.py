"""The runner for language models that MLX computes, with or without adapters; custom ones too.

    model_path -> registry.resolve -> registry.verify -> engine.load_model -> Engine

Each request is submitted to the engine on its own and shares its running batch. All that touches
the model happens in the engine's owner thread, so any thread may call a runner.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlops import engine
from mlops.engine.embedding import MAX_INPUTS
from mlops.errors import (
    AdapterNotFoundError,
    EngineShutdownError,
    InvalidRequestError,
    MLOpsError,
    ServiceError,
)
from mlops.serving.runner.answer import Answer, Prepared, read_result
from mlops.serving.runner.base import Prediction
from mlops.serving.runner.outputs import to_json

if TYPE_CHECKING:
    from mlops.registry import ResolvedModel

logger = logging.getLogger(__name__)

Input = str | Mapping[str, Any]
Result = TypeVar("Result")
MIB = 2**20
LONG_PROMPT = 50_000
"""Characters, or tokens: more take a tokenizer 0.1 s."""

DRAIN_S = 30.0
"""How long `unload_model` lets requests under way finish."""

TOKENIZED_AT_ONCE = 20_000
"""Tokens of one request for embeddings, before another's prompt is tokenized."""


class MLXModelRunner:
    """One model, loaded once and asked many times.

    Subclass it and override `_load_mlx_model` and `_mlx_predict` to serve any other MLX model; both
    run in the engine's owner thread, and `self.model` is what the first one returned.

    Args:
        model_path: a folder, a model tag or a hub id; a custom runner takes any file or folder.
        enable_mps: compute on Metal (or CUDA) where there is one.
        enable_unified_memory: set MLX's memory limits for this machine.
        base_model: the base of `model_path`, when that is an adapter; the same kinds of name.
        adapters: more adapters by the name that requests use; each a folder, tag or hub id.
        model_type: what predictions say they come from; `"custom"` for a subclass's own model.
        digest: what the store must say of the tag `model_path`.
        memory_budget_bytes: the most that weights may take when they are made float32 for a CPU,
            and weights, caches and adapters together; by default a share of the machine's memory.
        engine_config: the engine's other limits.

    Raises:
        ServiceError: an adapter's name cannot be used, or a custom model was given adapters.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        enable_mps: bool = True,
        enable_unified_memory: bool = True,
        base_model: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        model_type: str = "mlx",
        digest: str | None = None,
        memory_budget_bytes: int | None = None,
        engine_config: engine.EngineConfig | None = None,
    ) -> None:
        self.model_path = model_path
        self.enable_mps = enable_mps
        self.enable_unified_memory = enable_unified_memory
        self.base_model = base_model
        self.adapters = dict(adapters or {})
        self.model_type = "custom" if self._is_custom else model_type
        self.digest = digest
        self.memory_budget_bytes = memory_budget_bytes
        self.engine_config = engine_config or engine.EngineConfig()
        self.default_adapter: str | None = None
        self.resolved: ResolvedModel | None = None
        for name in self.adapters:
            _check_adapter_name(name)
        if self.adapters and self._is_custom:
            raise ServiceError(
                f"{type(self).__name__} computes its answers itself and takes no adapters: leave "
                f"{', '.join(self.adapters)} out",
                "load_model",
            )
        self._found_adapters: dict[str, _FoundAdapter] = {}
        self._changing_adapters = threading.Lock()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="mlops-tokenize")
        # What may take seconds waits for others like it, and not in front of everybody.
        self._tokenizing_long = ThreadPoolExecutor(1, thread_name_prefix="mlops-tokenize-long")
        self._grammars = ThreadPoolExecutor(1, thread_name_prefix="mlops-grammars")
        # What is loaded dies in the owner thread, even when the runner is only forgotten: the
        # model, and for a language model its engine.
        self._held: list[Any] = []
        weakref.finalize(self, _release_later, self._held).atexit = False

    @property
    def is_loaded(self) -> bool:
        """True between a `load_model` that succeeded and the next `unload_model`."""
        return bool(self._held)

    @property
    def fatal_error(self) -> str | None:
        """Why nothing will be computed any more in this process; None as long as it can be."""
        return engine.owner_failure()

    @property
    def model(self) -> Any:
        """What `_load_mlx_model` returned: an `engine.LoadedModel`, or a custom runner's model.

        Raises:
            EngineShutdownError: no model is loaded.
        """
        held = list(self._held)
        if not held:
            raise EngineShutdownError("the model is not loaded; call load_model() first")
        return held[0]

    def load_model(self) -> None:
        """Find, verify and load the model. Does nothing when it is loaded.

        Raises:
            BentoMLError: the model is missing, damaged or not one this runner can serve.
            MissingDependencyError: MLX is not installed.
        """
        engine.run_in_owner(self._load)

    @property
    def can_generate(self) -> bool:
        """True when `generate` answers: the model is a language model of the engine's."""
        return not self._is_custom

    def generate(self, input_data: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        """Begin to answer one request; returns at once, and prepares the prompt in a thread.

        Args:
            input_data: the fields that `engine.parse_request` takes.
            deadline_s: of `time.monotonic()`; later the request fails.

        Raises:
            EngineShutdownError: no model is loaded. What is wrong with the request, the answer
                raises.
        """
        running = self._engine
        prepared: Future[Prepared] = Future()
        asked = _AskedText(running, input_data, deadline_s, prepared)
        lane = self._lane_for(running, input_data, self._adapter_of(input_data.get("adapter")))
        lane.submit(self._begin_text, asked)
        return Answer(prepared, self._to_prediction)

    @property
    def max_choices(self) -> int:
        """Answers that one request may ask for: so many can wait. More would never be taken."""
        return max(1, self.engine_config.max_waiting)

    def token_bytes(self, token_ids: Sequence[int], adapter: str | None = None) -> list[bytes]:
        """Each token's own bytes, which may be a part of a character.

        Args:
            adapter: as in `embed`. One that is gone meanwhile has the base's tokens.

        Raises:
            EngineShutdownError: no model is loaded.
        """
        running = self._engine
        try:
            loaded = running.loaded_for(self._adapter_of(adapter))
        except AdapterNotFoundError:
            loaded = running.loaded
        return engine.token_bytes(loaded.tokenizer, token_ids)

    @property
    def can_embed(self) -> bool:
        """True when `embed` answers; known once the model is loaded."""
        held = list(self._held)
        return len(held) > 1 and held[0].pooler is not None

    def embed(
        self,
        inputs: Any,
        *,
        adapter: str | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
    ) -> Future[engine.EmbeddingResult]:
        """Begin to make vectors of texts; returns at once. See `EmbeddingRunner.embed`.

        Raises:
            EngineShutdownError: no model is loaded. What is wrong with the request, the future
                raises.
        """
        running, used = self._engine, self._adapter_of(adapter)
        answer: Future[engine.EmbeddingResult] = Future()
        try:
            held = running.hold(used)
        except Exception as exc:
            answer.set_exception(engine.to_exception(exc))
            return answer
        asked = _AskedEmbeddings(
            held, self._tokenize_inputs(held, inputs), used, dimensions, deadline_s
        )
        lane = self._lane_for(running, _longest(inputs), used)
        lane.submit(self._begin_embedding, running, asked, answer, lane)
        return answer

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names that requests may use; () before loading and for a custom model."""
        return next((one.adapters.names for one in list(self._held)[1:]), ())

    def add_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Verify, check and load an adapter while requests are answered; blocks until it is there.

        Args:
            path: a folder, a tag or a hub id.
            replace: a name that is there may mean the new one from now on; requests under way
                finish with the old one.

        Raises:
            EngineShutdownError: no model is loaded.
            InvalidRequestError: the name cannot be used, is there already, or is that of what the
                service was made from.
            BentoMLError: it is missing, damaged, or belongs to another base model.
            EngineError: there is no room for it.
        """
        from mlops import registry

        running = self._engine
        with self._changing_adapters:
            self._check_not_default(name)
            old = self._found_adapters.get(name)
            if old is not None and not replace:
                raise InvalidRequestError(
                    f"there is an adapter {name!r} already; replace it or choose another name",
                    "name",
                )
            base = self._base
            found = _FoundAdapter(registry.resolve(_plain(path), base_model=base.tag or base.path))
            found.verify()
            found.put_into(running, name)
            try:
                running.preload(name)
            except Exception:
                running.remove_adapter(name)
                if old is not None:
                    old.put_into(running, name)
                raise
            self._found_adapters[name] = found

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it.

        Raises:
            EngineShutdownError: no model is loaded.
            AdapterNotFoundError: there is none of this name.
            InvalidRequestError: it is what the service was made from.
        """
        running = self._engine
        with self._changing_adapters:
            self._check_not_default(name)
            running.remove_adapter(name)
            self._found_adapters.pop(name, None)

    def statistics(self) -> dict[str, Any]:
        """What the engine has done, in JSON types; {} before loading and for a custom model."""
        return next((one.statistics() for one in list(self._held)[1:]), {})

    def predict(self, input_data: Input) -> Prediction:
        """Answer one request; loads the model first when that has not been done.

        Args:
            input_data: the text, or the fields that `engine.parse_request` takes.

        Raises:
            InvalidRequestError: a field is missing or out of range; names it.
            AdapterNotFoundError: the request names an adapter that is not there.
            BentoMLError: the model cannot be loaded, or a custom output is not JSON.
        """
        if self._is_custom:
            return engine.run_in_owner(self._load_and, self._predict_custom, input_data)
        (answer,) = self._ask([input_data])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def predict_batch(self, inputs: Sequence[Input]) -> list[Prediction | Exception]:
        """Answer several requests together, in their order; a bad one gets its own exception."""
        if self._is_custom:
            return [_catch(self.predict, one) for one in inputs]
        return self._ask(inputs)

    def get_memory_usage(self) -> dict[str, Any]:
        """Memory that MLX uses in this process, in MiB, all of its models together.

        `active_mb` is in arrays, `cache_mb` in freed buffers kept for reuse, `total_mb` both,
        `peak_mb` the most that was ever active. Never waits for a generation.
        """
        mx = sys.modules.get("mlx.core")
        if mx is None or not hasattr(mx, "get_peak_memory"):
            # Not imported, or just being imported by another thread: nothing is in use yet.
            active = cache = peak = 0
            is_available = _has_mlx()
        else:
            active, cache = mx.get_active_memory(), mx.get_cache_memory()
            peak, is_available = mx.get_peak_memory(), True
        return {
            "active_mb": active / MIB,
            "cache_mb": cache / MIB,
            "total_mb": (active + cache) / MIB,
            "peak_mb": peak / MIB,
            "mlx_available": is_available,
        }

    def unload_model(self) -> None:
        """Let requests under way finish and give the memory back. Nothing when none is loaded.

        Raises:
            EngineShutdownError: the thread that could do it has died.
        """
        if self._held and (reason := self.fatal_error):
            raise EngineShutdownError(f"{reason}: the model cannot be unloaded")
        for running in list(self._held)[1:]:
            running.close(drain_s=DRAIN_S)
        engine.run_in_owner(_release, self._held)

    def describe(self) -> dict[str, Any]:
        """Facts about the model for people and `/health`, in JSON types; {} before loading."""
        held = list(self._held)
        if not held:
            return {}
        facts: dict[str, Any] = {"model_type": self.model_type}
        if self.resolved is not None:
            facts |= {"model_tag": self.resolved.tag, "digest": self.resolved.digest}
        if isinstance(held[0], engine.LoadedModel):
            loaded = held[0]
            facts |= {
                "architecture": loaded.architecture,
                "device": loaded.device,
                "layout": loaded.layout,
                "batched": loaded.can_batch,
                "context_tokens": loaded.context_tokens,
                "embeddings": loaded.pooler is not None,
                "adapters": list(held[1].adapters.names),
                "adapter_tags": {
                    name: found.model.tag
                    for name, found in list(self._found_adapters.items())
                    if found.model.tag
                },
                "default_adapter": self.default_adapter,
            }
        return facts

    # The two hooks. Both run in the owner thread.

    def _load_mlx_model(self) -> Any:
        """Load the model. Override it to load any other kind; return what `_mlx_predict` needs."""
        from mlops import registry

        resolved = registry.resolve(self._reference, base_model=self.base_model, digest=self.digest)
        registry.verify(resolved)
        self.resolved = resolved
        self._found_adapters = self._find_adapters(resolved)
        base = resolved.base or resolved
        return engine.load_model(
            base.checkpoint,
            enable_mps=self.enable_mps,
            enable_unified_memory=self.enable_unified_memory,
            memory_budget_bytes=self.memory_budget_bytes,
            digest=base.digest,
        )

    def _mlx_predict(self, input_data: Input) -> Any:
        """Answer one request. Override it to compute anything; return JSON types or arrays."""
        if not isinstance(self.model, engine.LoadedModel):
            raise ServiceError(
                f"{type(self).__name__} overrides _load_mlx_model and not _mlx_predict: override "
                "both",
                "predict",
            )
        (answer,) = self._ask([input_data])
        if isinstance(answer, Exception):
            raise answer
        return answer

    # What runs in the owner thread besides the hooks.

    def _load(self) -> None:
        if self._held:
            return
        try:
            if self._loads_its_own:
                self._find_files()
                self._prepare_mlx()
            model = self._load_mlx_model()
            held = [model]
            if isinstance(model, engine.LoadedModel):
                held.append(self._start_engine(model))
            self._held += held
        except MLOpsError:
            _collect()
            raise
        except BaseException as exc:  # a hook's sys.exit() too
            _collect()
            raise ServiceError(
                f"{self.model_path} cannot be loaded: {type(exc).__name__}: {exc}",
                "load_model",
                {"path": str(self.model_path), "model_type": self.model_type},
            ) from exc

    def _start_engine(self, loaded: engine.LoadedModel) -> engine.Engine:
        config = replace(self.engine_config, memory_bytes=self.memory_budget_bytes)
        running = engine.Engine(loaded, config)
        for name, found in self._found_adapters.items():
            found.put_into(running, name)
        running.preload()
        return running

    @property
    def _engine(self) -> engine.Engine:
        """What generates text.

        Raises:
            EngineShutdownError: no model is loaded.
        """
        held = list(self._held)
        if len(held) < 2:
            raise EngineShutdownError("the model is not loaded; call load_model() first")
        running: engine.Engine = held[1]
        return running

    def _ask(self, inputs: Sequence[Input]) -> list[Prediction | Exception]:
        """Load when needed and answer; a caller who is interrupted cancels what he asked for."""
        engine.run_in_owner(self._load)
        running = self._engine
        prepared = [_catch(self._prepare, running, one) for one in inputs]
        try:
            return [
                one if isinstance(one, Exception) else _catch(self._wait, running, one)
                for one in prepared
            ]
        finally:
            for one in prepared:
                if isinstance(one, Prepared):
                    one.cancel()

    def _adapter_of(self, name: Any) -> Any:
        """The adapter that a field of a request means; None is the base model."""
        name = self.default_adapter if name is None else name
        return None if name == engine.BASE_NAME else name

    def _lane_for(self, running: engine.Engine, asked: object, adapter: Any) -> ThreadPoolExecutor:
        """The thread that tokenizes this: what may take long holds up its like alone."""
        is_quick = not isinstance(adapter, str) or running.has_tokenizer(adapter)
        is_long = not is_quick or engine.is_longer(asked, LONG_PROMPT)
        return self._tokenizing_long if is_long else self._tokenizing

    def _tokenize_inputs(self, held: engine.HeldAdapter, inputs: Any) -> Iterator[tuple[int, ...]]:
        """Texts for embeddings, in the thread that asks for the first one."""
        yield from engine.tokenize_inputs(
            held.loaded,
            inputs,
            max_prompt_tokens=self.engine_config.max_prompt_tokens,
        )

    def _prepare(self, running: engine.Engine, input_data: Input) -> Prepared:
        """Check, tokenize and submit a request."""
        asked = self._tokenize(running, input_data, None)
        with asked.held:
            return self._submit(running, asked)

    def _begin_text(self, asked: _AskedText) -> None:
        """Check and tokenize; a grammar, if there is one, is for another thread."""
        if asked.answer.cancelled():
            return
        with asked.failing():
            tokenized = self._tokenize(asked.running, asked.input_data, asked.deadline_s)
            if engine.may_need_grammar(tokenized.request):
                self._grammars.submit(self._finish_text, asked, tokenized)
            else:
                self._finish_text(asked, tokenized)

    def _finish_text(self, asked: _AskedText, tokenized: _Tokenized) -> None:
        with tokenized.held, asked.failing():
            if not asked.answer.cancelled():
                asked.succeed(self._submit(asked.running, tokenized))

    def _tokenize(
        self, running: engine.Engine, input_data: Input, deadline_s: float | None
    ) -> _Tokenized:
        """Check a request and make its prompt; the adapter stays held."""
        request = engine.parse_request(input_data)
        if request.n > self.max_choices:
            raise InvalidRequestError(
                f"n must be from 1 to {self.max_choices} in this service, not {request.n}", "n"
            )
        adapter = request.adapter if request.names_adapter else self.default_adapter
        held = running.hold(adapter)
        try:
            generation = engine.to_generation_request(
                held.loaded,
                request,
                adapter=adapter,
                deadline_s=deadline_s,
                max_prompt_tokens=self.engine_config.max_prompt_tokens,
            )
        except BaseException:
            held.release()
            raise
        return _Tokenized(request, generation, held)

    def _submit(self, running: engine.Engine, asked: _Tokenized) -> Prepared:
        """Compile the grammar, if there is one, and submit each choice."""
        request, loaded = asked.request, asked.held.loaded
        generation = engine.add_grammar(loaded, request, asked.generation)
        prepared = Prepared(generation, make_reader=_reader_of(loaded, request.tools))
        try:
            for choice in engine.split_choices(generation, request.n):
                prepared.generations.append(running.submit(choice, asked.held))
        except MLOpsError:
            prepared.cancel()
            raise
        return prepared

    def _begin_embedding(
        self,
        running: engine.Engine,
        asked: _AskedEmbeddings,
        answer: Future[engine.EmbeddingResult],
        lane: ThreadPoolExecutor,
    ) -> None:
        """Tokenize and submit; after some tokens others' prompts go first."""
        try:
            num_tokens = 0
            for ids in asked.inputs:
                asked.tokenized.append(ids)
                num_tokens += len(ids)
                if answer.cancelled():
                    break
                if num_tokens > TOKENIZED_AT_ONCE:
                    lane.submit(self._begin_embedding, running, asked, answer, lane)
                    return
            if not answer.cancelled():
                running.embed(asked.to_request(), answer, asked.held)
        except BaseException as exc:  # a tokenizer may raise what is no Exception
            if answer.set_running_or_notify_cancel():
                answer.set_exception(engine.to_exception(exc))
        asked.held.release()

    def _wait(self, running: engine.Engine, prepared: Prepared) -> Prediction:
        results = [running.wait(generation) for generation in prepared.generations]
        return self._to_prediction(prepared, results)

    def _load_and(self, work: Callable[..., Result], *arguments: Any) -> Result:
        self._load()
        return work(*arguments)

    def _find_files(self) -> None:
        """Make a custom runner's `model_path`, when it is a tag or a hub id, a folder."""
        if self.digest is not None or not Path(self.model_path).exists():
            from mlops import registry

            self.resolved = registry.resolve(self._reference, digest=self.digest)
            registry.verify(self.resolved)
            self.model_path = self.resolved.path

    def _prepare_mlx(self) -> None:
        """What the engine does before it loads a model; a hook may import MLX at once."""
        if _has_mlx():
            from mlops.hardware import apply_memory_limits, ensure_blas, select_device

            ensure_blas()
            select_device(self.enable_mps)
            apply_memory_limits(self.enable_unified_memory, self.memory_budget_bytes)

    def _predict_custom(self, input_data: Input) -> Prediction:
        output = to_json(self._mlx_predict(input_data))
        fields = {"mlx_optimized": True, "model_type": self.model_type}
        if isinstance(output, dict) and "prediction" in output:
            return {**fields, **output}
        return {"prediction": output, **fields}

    def _to_prediction(
        self, prepared: Prepared, results: Sequence[engine.GenerationResult]
    ) -> Prediction:
        first, request = results[0], prepared.request
        choices = [_to_choice(prepared, result) for result in results]
        completion_tokens = sum(result.completion_tokens for result in results)
        prediction = {
            "prediction": choices[0]["text"],
            "mlx_optimized": True,
            "model_type": self.model_type,
            "usage": {
                "prompt_tokens": first.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": first.prompt_tokens + completion_tokens,
                "cached_tokens": first.cached_tokens,
            },
            **{name: value for name, value in choices[0].items() if name != "text"},
            "adapter": request.adapter,
            "timings": {
                "queue_ms": round(first.queue_ms, 3),
                "first_token_ms": round(first.first_token_ms, 3),
                "total_ms": round(max(result.total_ms for result in results), 3),
            },
        }
        if len(results) > 1:
            prediction["choices"] = [
                {"index": index, **choice} for index, choice in enumerate(choices)
            ]
        return prediction

    def _find_adapters(self, resolved: ResolvedModel) -> dict[str, _FoundAdapter]:
        """The adapters by name: the model's own, and those that were given."""
        from mlops import registry

        found: dict[str, _FoundAdapter] = {}
        self.default_adapter = None
        if resolved.is_adapter:
            self.default_adapter = _name_adapter(resolved)
            found[self.default_adapter] = _FoundAdapter(resolved)
        base = resolved.base or resolved
        for name, path in self.adapters.items():
            if name in found:
                raise ServiceError(
                    f"two adapters are called {name!r}; give the one of adapters= another name",
                    "load_model",
                    {"adapter": name},
                )
            found[name] = _FoundAdapter(
                registry.resolve(_plain(path), base_model=base.tag or base.path)
            )
        return found

    @property
    def _base(self) -> ResolvedModel:
        """What adapters are for."""
        if self.resolved is None:
            raise ServiceError(f"{self.model_path} takes no adapters", "load_adapter")
        return self.resolved.base or self.resolved

    def _check_not_default(self, name: str) -> None:
        if name == self.default_adapter:
            raise InvalidRequestError(
                f"the adapter {name!r} is what this service was made from: it stays as it is",
                "name",
            )

    @property
    def _reference(self) -> str | Path:
        """`model_path` as the registry takes it; the tag again where `_find_files` was before."""
        found = self.resolved
        if found is not None and found.tag and self.model_path == found.path:
            return found.tag
        return _plain(self.model_path)

    @property
    def _is_custom(self) -> bool:
        return self._loads_its_own or type(self)._mlx_predict is not MLXModelRunner._mlx_predict

    @property
    def _loads_its_own(self) -> bool:
        return type(self)._load_mlx_model is not MLXModelRunner._load_mlx_model


@dataclass(frozen=True)
class _FoundAdapter:
    """An adapter that a request can name, on disk."""

    model: ResolvedModel

    def verify(self) -> None:
        """Hash its files; the base has been verified, once."""
        from mlops import registry

        registry.verify(replace(self.model, base=None))

    def put_into(self, running: engine.Engine, name: str) -> None:
        """Make it known to an engine."""
        model = self.model
        for warning in model.checkpoint.warnings:
            logger.warning("the adapter %r: %s", name, warning)
        running.add_adapter(name, model.checkpoint, digest=model.digest, verify=self.verify)


@dataclass(frozen=True)
class _AskedText:
    """A request for text, while it is prepared.

    Attributes:
        input_data: as the client sent it.
        answer: set once it is submitted; cancelled when nobody waits for it any more.
    """

    running: engine.Engine
    input_data: Mapping[str, Any]
    deadline_s: float | None
    answer: Future[Prepared]

    def succeed(self, prepared: Prepared) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(prepared)
        else:
            prepared.cancel()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever is raised in this block becomes the answer."""
        try:
            yield
        except BaseException as exc:  # a tokenizer may raise what is no Exception
            if self.answer.set_running_or_notify_cancel():
                self.answer.set_exception(engine.to_exception(exc))


@dataclass(frozen=True)
class _Tokenized:
    """A request for text with its prompt.

    Attributes:
        held: its adapter, to be released once the engine has the request.
    """

    request: engine.TextRequest
    generation: engine.GenerationRequest
    held: engine.HeldAdapter


@dataclass(frozen=True)
class _AskedEmbeddings:
    """A request for embeddings, while it is tokenized.

    Attributes:
        held: its adapter, to be released once the engine has the request.
        inputs: gives the token ids of the next text.
    """

    held: engine.HeldAdapter
    inputs: Iterator[tuple[int, ...]]
    adapter: str | None
    dimensions: int | None
    deadline_s: float | None
    tokenized: list[tuple[int, ...]] = field(default_factory=list)

    def to_request(self) -> engine.EmbeddingRequest:
        return engine.EmbeddingRequest(
            tuple(self.tokenized), self.adapter, self.dimensions, self.deadline_s
        )


def _reader_of(
    loaded: engine.LoadedModel, tools: engine.Tools | None
) -> Callable[[], engine.ToolReader] | None:
    """What makes a reader of calls for each choice; None for a request without functions."""
    form = None if tools is None else engine.find_form(loaded.tokenizer)
    if tools is None or form is None:
        return None
    return partial(engine.ToolReader, form, tools)


def _to_choice(prepared: Prepared, result: engine.GenerationResult) -> dict[str, Any]:
    """One choice, with the fields that it has in a prediction."""
    answered = read_result(prepared, result)
    choice: dict[str, Any] = {"text": answered.text, "finish_reason": answered.finish_reason}
    if answered.tool_calls:
        choice["tool_calls"] = [asdict(call) for call in answered.tool_calls]
    if prepared.request.logprobs is not None:
        # Not `asdict`, which copies every pair: there may be a million.
        choice["logprobs"] = [
            {"token": one.token, "logprob": one.logprob, "top": one.top} for one in result.logprobs
        ]
    return choice


def _longest(inputs: Any) -> Any:
    """The longest of several texts for embeddings: a thread tokenizes them one by one."""
    if not isinstance(inputs, list | tuple) or isinstance(next(iter(inputs), 0), int):
        return inputs
    texts = [one for one in inputs[:MAX_INPUTS] if isinstance(one, str | list | tuple)]
    return max(texts, key=len, default="")


def _has_mlx() -> bool:
    return find_spec("mlx") is not None and find_spec("mlx.core") is not None


def _plain(model: str | Path) -> str | Path:
    # The registry takes a Path for a folder only: tags and hub ids are text.
    return model if isinstance(model, str) else Path(model)


def _check_adapter_name(name: object) -> None:
    if not isinstance(name, str) or not name or name == engine.BASE_NAME:
        raise ServiceError(
            f"an adapter cannot be called {name!r}; give a text other than "
            f"{engine.BASE_NAME!r}, which asks for the base model",
            "load_model",
        )


def _name_adapter(resolved: ResolvedModel) -> str:
    """The name of a model's own adapter: its tag without the version, or its folder."""
    name = resolved.tag.partition(":")[0] if resolved.tag else resolved.path.name
    return f"{name}-adapter" if name == engine.BASE_NAME else name


def _catch(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the exception it raises: one bad request spoils no batch."""
    try:
        return function(*arguments)
    except Exception as exc:
        return exc
    except BaseException as exc:
        if not engine.in_owner():  # the caller's own Ctrl-C
            raise
        return engine.to_exception(exc)


def _release(held: list[Any]) -> None:
    if held:
        for running in held[1:]:
            running.close()
        held.clear()
        _collect()


def _release_later(held: list[Any]) -> None:
    if held and engine.owner_failure() is None:
        engine.submit_to_owner(_release, held)


def _collect() -> None:
    gc.collect()
    mx = sys.modules.get("mlx.core")
    if mx is not None:
        mx.clear_cache()
