"""Whether a model's name leads anywhere, asked once and quickly: libraries ask for file after file, again and again."""

from __future__ import annotations

from pathlib import Path

from retain.config import STARTER
from retain.errors import ModelError

SECONDS = 5.0  # that the hub may take to answer
ALLOWED = f"Give '{STARTER}', a folder with config.json and weights, or a hub id such as organisation/name."


def require(name: str, revision: str | None = None) -> None:
    """Refuse a name that is no folder, is not in the hub's cache, and is not found on the hub.

    Raises:
        ModelError: a file, a name that no model can have, a model or revision that is not there or not open, or a hub
            that cannot be reached.
    """
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise ModelError(f"model.name: '{name}' is a file. {ALLOWED}")
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import validate_repo_id

    nowhere = f"model.name: '{name}' is no folder that is there"
    try:
        validate_repo_id(name)
    except hub.HFValidationError:
        raise ModelError(f"{nowhere}, and cannot be a hub id. {ALLOWED}") from None
    for file in ("config.json", "adapter_config.json"):
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=SECONDS)
    except hub.EntryNotFoundError:
        return  # the model is there, and perhaps an adapter
    except hub.GatedRepoError as error:
        raise ModelError(
            f"model.name: '{name}' is on the hub, but not open to you. Ask for access on its page, then log in with "
            "`hf auth login`."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"{nowhere}, and not found on the hub, unless it is private and you are not logged in. {ALLOWED}"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(
            f"model.revision: '{name}' has no '{revision}' on the hub. Give a branch, tag or commit of it."
        ) from error
    except hub.OfflineModeIsEnabled as error:
        raise ModelError(
            f"{nowhere}, not in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched. {ALLOWED}"
        ) from error
    except Exception as error:  # whatever the network says, in the words of whichever library makes the connection
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelError(
            f"{nowhere}, not in the hub's cache, and the hub cannot be reached ({reason}). {ALLOWED}"
        ) from error
