"""BentoML looks at BENTOML_HOME once a process; tests have one each."""

from __future__ import annotations

_PROVIDERS = (
    "bentoml_home",
    "tmp_bento_store_dir",
    "bento_store_dir",
    "model_store_dir",
    "env_store_dir",
    "bento_store",
    "tmp_bento_store",
    "model_store",
)


def look_again() -> None:
    """Let BentoML look at BENTOML_HOME once more, when it is next asked."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from simple_di import sentinel

    for name in _PROVIDERS:
        provider = getattr(BentoMLContainer, name)
        provider.reset()
        provider._cache = sentinel
