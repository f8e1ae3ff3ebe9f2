"""A Bento of a base model and two adapters, as it lies in its store and where it is published."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

TAG = "demo:1.0.0"
PACKAGE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from mlops.registry import shared
    from mlops.serving.bentoml.packager import package_model
    from tiny_models import write_language_model, write_lora_adapter

    folder = Path(sys.argv[1])
    base = write_language_model(folder / "base")
    adapters = {
        name: write_lora_adapter(folder / name, base, seed=seed)
        for seed, name in enumerate(("tone", "style"), 1)
    }
    package_model(base, "demo", model_version="1.0.0", adapters=adapters)
    print(shared.publish("demo:1.0.0", sys.argv[2]))
""")


@dataclass(frozen=True)
class Published:
    """A store with a Bento, and the folder where it is published."""

    home: Path
    place: Path
    digest: str

    @property
    def index(self) -> Path:
        return self.place / "index" / "demo" / "1.0.0.json"

    def blob(self, path: str, tag: str = TAG) -> Path:
        """Where the content of a model's file is published."""
        file = self.home / "models" / tag.replace(":", "/") / path
        (found,) = [
            blob for blob in (self.home / "mlops" / "blobs").iterdir() if blob.samefile(file)
        ]
        return self.place / "blobs" / found.name
