"""The runner for language models that MLX computes, with or without adapters; custom ones too.

    model_path -> registry.resolve -> registry.verify -> engine.load_model -> engine.generate

All that touches the model happens in the engine's owner thread, so any thread may call a runner.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlops import engine
from mlops.errors import EngineShutdownError, MLOpsError, ServiceError
from mlops.serving.runner.base import Prediction
from mlops.serving.runner.outputs import to_json

if TYPE_CHECKING:
    from mlops.checkpoints import Checkpoint
    from mlops.registry import ResolvedModel

Input = str | Mapping[str, Any]
IsCancelled = Callable[[], bool]
Result = TypeVar("Result")
MIB = 2**20


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
        memory_budget_bytes: the most that weights may take when they are made float32 for a CPU;
            by default a share of the machine's memory.

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
    ) -> None:
        self.model_path = model_path
        self.enable_mps = enable_mps
        self.enable_unified_memory = enable_unified_memory
        self.base_model = base_model
        self.adapters = dict(adapters or {})
        self.model_type = "custom" if self._is_custom else model_type
        self.digest = digest
        self.memory_budget_bytes = memory_budget_bytes
        self.default_adapter: str | None = None
        self.resolved: ResolvedModel | None = None
        for name in self.adapters:
            _check_adapter_name(name)
        # What is loaded dies in the owner thread, even when the runner is only forgotten.
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

    def predict(self, input_data: Input, *, is_cancelled: IsCancelled | None = None) -> Prediction:
        """Answer one request; loads the model first when that has not been done.

        Args:
            input_data: the text, or the fields that `engine.parse_request` takes.
            is_cancelled: asked at every token; once it says True, generation ends.

        Raises:
            InvalidRequestError: a field is missing or out of range; names it.
            AdapterNotFoundError: the request names an adapter that is not there.
            BentoMLError: the model cannot be loaded, or a custom output is not JSON.
        """
        if self._is_custom:
            return engine.run_in_owner(self._load_and, self._predict_custom, input_data)
        request = engine.parse_request(input_data)
        (answer,) = self._ask([request], [is_cancelled])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def predict_batch(
        self,
        inputs: Sequence[Input],
        *,
        is_cancelled: Sequence[IsCancelled | None] | None = None,
    ) -> list[Prediction | Exception]:
        """Answer several requests together, in their order; a bad one gets its own exception.

        Args:
            is_cancelled: as for `predict`, one for each input.
        """
        if self._is_custom:
            return [_catch(self.predict, one) for one in inputs]
        watchers = is_cancelled if is_cancelled is not None else [None] * len(inputs)
        answers: list[Any] = [_catch(engine.parse_request, one) for one in inputs]
        good = [n for n, answer in enumerate(answers) if isinstance(answer, engine.TextRequest)]
        if good:
            asked = self._ask([answers[n] for n in good], [watchers[n] for n in good])
            for n, answer in zip(good, asked, strict=True):
                answers[n] = answer
        return answers

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
        """Give the memory back. Does nothing when no model is loaded."""
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
                "adapters": list(loaded.adapters.names),
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
        adapters = self._resolve_adapters(resolved)
        base = resolved.base or resolved
        return engine.load_model(
            base.checkpoint,
            adapters=adapters,
            enable_mps=self.enable_mps,
            enable_unified_memory=self.enable_unified_memory,
            memory_budget_bytes=self.memory_budget_bytes,
        )

    def _mlx_predict(self, input_data: Input) -> Any:
        """Answer one request. Override it to compute anything; return JSON types or arrays."""
        (answer,) = self._answer([engine.parse_request(input_data)], [None])
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
            self._held.append(self._load_mlx_model())
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

    def _ask(
        self, requests: Sequence[engine.TextRequest], is_cancelled: Sequence[IsCancelled | None]
    ) -> list[Prediction | Exception]:
        """Load when needed and answer; a caller who is interrupted cancels what he asked for."""
        abandoned = threading.Event()

        def watch(is_one_cancelled: IsCancelled | None) -> IsCancelled:
            return lambda: abandoned.is_set() or bool(is_one_cancelled and is_one_cancelled())

        try:
            return engine.run_in_owner(
                self._load_and, self._answer, requests, [watch(one) for one in is_cancelled]
            )
        except (KeyboardInterrupt, SystemExit):
            abandoned.set()
            raise

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

    def _answer(
        self, requests: Sequence[engine.TextRequest], is_cancelled: Sequence[IsCancelled | None]
    ) -> list[Prediction | Exception]:
        loaded = self.model
        if not isinstance(loaded, engine.LoadedModel):
            raise ServiceError(
                f"{type(self).__name__} overrides _load_mlx_model and not _mlx_predict: override "
                "both",
                "predict",
            )

        def prepare(n: int) -> engine.GenerationRequest:
            request = requests[n]
            adapter = request.adapter if request.names_adapter else self.default_adapter
            loaded.adapters.check(adapter)
            return engine.to_generation_request(
                loaded, request, adapter=adapter, is_cancelled=is_cancelled[n]
            )

        answers: list[Any] = [_catch(prepare, n) for n in range(len(requests))]
        good = [n for n, one in enumerate(answers) if isinstance(one, engine.GenerationRequest)]
        results = engine.generate(loaded, [answers[n] for n in good])
        for n, result in zip(good, results, strict=True):
            if isinstance(result, engine.GenerationResult):
                answers[n] = self._to_prediction(answers[n], result)
            else:
                answers[n] = result
        return answers

    def _to_prediction(
        self, request: engine.GenerationRequest, result: engine.GenerationResult
    ) -> Prediction:
        return {
            "prediction": result.text,
            "mlx_optimized": True,
            "model_type": self.model_type,
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "completion_tokens": result.completion_tokens,
                "total_tokens": result.prompt_tokens + result.completion_tokens,
            },
            "finish_reason": result.finish_reason,
            "adapter": request.adapter,
            "timings": {
                "first_token_ms": round(result.first_token_ms, 3),
                "total_ms": round(result.total_ms, 3),
            },
        }

    def _resolve_adapters(self, resolved: ResolvedModel) -> dict[str, Checkpoint]:
        from mlops import registry

        checkpoints = {}
        self.default_adapter = None
        if resolved.is_adapter:
            self.default_adapter = _name_adapter(resolved)
            checkpoints[self.default_adapter] = resolved.checkpoint
        base = resolved.base or resolved
        for name, path in self.adapters.items():
            if name in checkpoints:
                raise ServiceError(
                    f"two adapters are called {name!r}; give the one of adapters= another name",
                    "load_model",
                    {"adapter": name},
                )
            adapter = registry.resolve(_plain(path), base_model=base.tag or base.path)
            registry.verify(replace(adapter, base=None))  # the base has been verified, once
            checkpoints[name] = adapter.checkpoint
        return checkpoints

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
