"""One registry for all of a team's projects, over BentoML's store: tags, digests, verified content.

Only this package writes to the model store.
"""

from mlops.registry.references import ResolvedModel, resolve, verify
from mlops.registry.store import ModelStore, StoredModel

__all__ = ["ModelStore", "ResolvedModel", "StoredModel", "resolve", "verify"]
