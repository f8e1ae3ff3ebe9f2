"""Models from the Hugging Face Hub: downloaded once, at a commit that stays the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlops.checkpoints.refusal import refusal

ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)
"""What is downloaded: weights, configuration and tokenizer, never code or pickles."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class HubSnapshot:
    """A model of the hub on this machine.

    Attributes:
        path: folder with its files.
        revision: the commit it was resolved to.
    """

    path: Path
    revision: str


def looks_like_hub_id(text: str) -> bool:
    """True for `org/name`."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and "--" not in text


def download(hub_id: str, revision: str | None = None) -> HubSnapshot:
    """Get a model from the local cache or from the hub, with a progress bar.

    Args:
        hub_id: `org/name`.
        revision: a branch, tag or commit; the main branch when None.

    Raises:
        PackagingError: there is no such model, it needs a login, or the hub cannot be reached and
            the model is not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(reason: str) -> Exception:
        return refusal(reason, hub_id, "download", hub_id=hub_id, revision=revision)

    local = "download it elsewhere and pass the folder"
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=list(ALLOWED)
            )
        )
    except errors.GatedRepoError as exc:
        raise refuse(
            f"{hub_id} is open only to who has accepted its terms: accept them on its page and "
            "log in with `hf auth login`"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise refuse(f"{hub_id} has no revision {revision!r}") from exc
    except errors.RepositoryNotFoundError as exc:
        raise refuse(
            f"{hub_id} is not on the Hugging Face Hub, or it is private: check the name, or log in "
            "with `hf auth login`"
        ) from exc
    except errors.HFValidationError as exc:
        raise refuse(f"{hub_id!r} is not a Hugging Face id (org/name)") from exc
    except (OSError, errors.HTTPError) as exc:  # OSError: also offline and not in the cache
        raise refuse(
            f"{hub_id} is not in the local cache and could not be downloaded from the Hugging "
            f"Face Hub ({type(exc).__name__}); check the network, or {local}"
        ) from exc
    return HubSnapshot(path, path.name)
