"""Bentos for tests on Ray: a tiny language model with adapters, and a service that waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.bentoml.packager import package_model
from tiny_models import write_language_model, write_lora_adapter

ADAPTERS = ("ada", "bob", "cyd", "dot")
LATER_ADAPTER = "eve"

_WAITING = """
import os
import time
from pathlib import Path

from mlops.serving.bentoml.service import create_bentoml_service

VERSION = {version!r}


class Waiting:
    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        if VERSION.endswith("broken"):
            raise RuntimeError("the weights are not there")
        self.is_loaded = True

    def predict(self, input_data):
        if input_data["input"] == "hang":
            time.sleep(3600)
        time.sleep(float(input_data["input"]))
        return {{"prediction": [VERSION, os.getpid()]}}

    def predict_batch(self, inputs):
        time.sleep(max(float(one["input"]) for one in inputs if one["input"] != "hang") if any(
            one["input"] != "hang" for one in inputs) else 3600)
        return [{{"prediction": [VERSION, os.getpid()]}} for _ in inputs]

    def get_memory_usage(self):
        return {{}}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service(
    str(Path(__file__).parent), runner_class=Waiting, config={config!r},
)
"""


_BUILD = """
import sys
from bentoml._internal.bento.bento import Bento
from bentoml._internal.bento.build_config import BentoBuildConfig

config = BentoBuildConfig(
    service="service:svc", name="waiting", include=["service.py"], python={"lock_packages": False}
)
# `bentoml build` would bring uv, from the network.
Bento.create(
    config, version=sys.argv[2], build_ctx=sys.argv[1], enabled_features=["no_image"]
).save()
"""


def write_models(folder: Path) -> Path:
    """The base model and its adapters, as folders; returns the base's."""
    base = write_language_model(folder / "base")
    for number, name in enumerate((*ADAPTERS, LATER_ADAPTER)):
        write_lora_adapter(
            folder / name, base, scale=20.0, seed=10 + number, base_reference=str(base)
        )
    return base


def package_tiny(folder: Path, version: str, **settings: object) -> str:
    """Package the base with its adapters; returns the tag of the Bento."""
    result = package_model(
        str(folder / "base"),
        "tiny",
        "support",
        model_version=version,
        adapters={name: str(folder / name) for name in ADAPTERS},
        service=BentoMLConfig(**settings) if settings else None,  # type: ignore[arg-type]
    )
    return str(result["bento_tag"])


def build_waiting(folder: Path, version: str, **config: object) -> str:
    """Build the Bento of a service that answers after as many seconds as it is asked for.

    In a process of its own: BentoML leaves much behind in one that builds.
    """
    context = folder / f"waiting-{version}"
    context.mkdir()
    settings = {"service_name": "waiting", "project_name": "tests", **config}
    (context / "service.py").write_text(_WAITING.format(version=version, config=settings))
    subprocess.run(
        [sys.executable, "-c", _BUILD, str(context), version],
        check=True,
        env={**os.environ, "BENTOML_DO_NOT_TRACK": "True"},
        capture_output=True,
        timeout=120,
    )
    return f"waiting:{version}"
