"""Run by `.tools/reference`'s Python: how transformers reads a `config.json`.

Reads a JSON list of configurations, prints their `rope_parameters`, and which `model_type`s there
are.

Usage: config_reference.py CONFIGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import CONFIG_MAPPING

if __name__ == "__main__":
    configs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    read = [CONFIG_MAPPING[config["model_type"]].from_dict(config) for config in configs]
    ropes = [config.rope_parameters for config in read]
    print(json.dumps({"ropes": ropes, "model_types": sorted(CONFIG_MAPPING)}))
