"""The runner for language models that MLX computes, with or without adapters; custom ones too.

    model_path -> registry.resolve -> registry.verify -> engine.load_model -> Engine

Each request is submitted to the engine on its own and shares its running batch. All that touches
the model happens in the engine's owner thread, so any thread may call a runner.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlops import engine
from mlops.errors import EngineShutdownError, MLOpsError, ServiceError
from mlops.serving.runner.answer import Answer, Prepared
from mlops.serving.runner.base import Prediction
from mlops.serving.runner.outputs import to_json

if TYPE_CHECKING:
    from mlops.registry import ResolvedModel

Input = str | Mapping[str, Any]
Result = TypeVar("Result")
MIB = 2**20
DRAIN_S = 30.0
"""How long `unload_model` lets requests under way finish."""


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
        ServiceError: an adapter's name cannot be used.
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
        self._found_adapters: dict[str, _FoundAdapter] = {}
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="mlops-tokenize")
        # What is loaded dies in the owner thread, even when the runner is only forgotten: the
        # model, and for a language model its engine.
        self._held: list[Any] = []
        weakref.finalize(self, _release_later, self._held).atexit = False

    @property
    def is_loaded(self) -> bool:
        """True between a `load_model` that succeeded and the next `unload_model`."""
        return bool(self._held)

    @property
    def model(self) -> Any:
        """What `_load_mlx_model` returned: an `engine.LoadedModel`, or a custom runner's model.

        Raises:
            EngineShutdownError: no model is loaded.
        """
        held = list(self._held)
        if not held:
            raise EngineShutdownError(f"{self.model_path} is not loaded; call load_model() first")
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
        prepared = self._tokenizing.submit(self._prepare, running, input_data, deadline_s)
        return Answer(prepared, self._to_prediction)

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
        """Let requests under way finish and give the memory back. Nothing when none is loaded."""
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
                "adapters": list(held[1].adapters.names),
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
            running.add_adapter(
                name, found.model.checkpoint, digest=found.model.digest, verify=found.verify
            )
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
            raise EngineShutdownError(f"{self.model_path} is not loaded; call load_model() first")
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

    def _prepare(
        self, running: engine.Engine, input_data: Input, deadline_s: float | None = None
    ) -> Prepared:
        """Check and tokenize a request, and submit each of its choices."""
        request = engine.parse_request(input_data)
        adapter = request.adapter if request.names_adapter else self.default_adapter
        generation_request = engine.to_generation_request(
            running.loaded, request, adapter=adapter, deadline_s=deadline_s
        )
        prepared = Prepared(generation_request)
        try:
            for choice in engine.split_choices(generation_request, request.n):
                prepared.generations.append(running.submit(choice))
        except MLOpsError:
            prepared.cancel()
            raise
        return prepared

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
            apply_memory_limits(self.enable_unified_memory)

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
        completion_tokens = sum(result.completion_tokens for result in results)
        prediction = {
            "prediction": first.text,
            "mlx_optimized": True,
            "model_type": self.model_type,
            "usage": {
                "prompt_tokens": first.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": first.prompt_tokens + completion_tokens,
                "cached_tokens": first.cached_tokens,
            },
            "finish_reason": first.finish_reason,
            "adapter": request.adapter,
            "timings": {
                "queue_ms": round(first.queue_ms, 3),
                "first_token_ms": round(first.first_token_ms, 3),
                "total_ms": round(max(result.total_ms for result in results), 3),
            },
        }
        if request.logprobs is not None:
            prediction["logprobs"] = [asdict(one) for one in first.logprobs]
        if len(results) > 1:
            prediction["choices"] = [
                {
                    "index": index,
                    "text": result.text,
                    "finish_reason": result.finish_reason,
                    **(
                        {}
                        if request.logprobs is None
                        else {"logprobs": [asdict(one) for one in result.logprobs]}
                    ),
                }
                for index, result in enumerate(results)
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
    if held:
        engine.submit_to_owner(_release, held)


def _collect() -> None:
    gc.collect()
    mx = sys.modules.get("mlx.core")
    if mx is not None:
        mx.clear_cache()
