"""Exported folders on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub

from ds_lvxattn.errors import ConfigError


def check_hub(repository: str | None) -> None:
    """Raise ``ConfigError`` where nothing can be pushed to ``repository``; asks no server."""
    if repository is None:
        return
    given = f"'finetuning.push_to_hub' is {repository!r}"
    if repository.count("/") > 1 or not all(repository.split("/")):
        raise ConfigError(f"{given}, which is no repository; give NAME or OWNER/NAME")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{given}, and HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE')}; leave one of them out")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"{given}, and there is no token; run 'hf auth login', or set HF_TOKEN")


def push(folder: Path, repository: str, inside: str = "") -> str:
    """Upload a folder, to a folder ``inside`` the repository or as the whole of it; returns what to tell of it.

    What fails is told, not raised: the folder is there, and can be uploaded by hand.
    """
    try:
        made = huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        address = huggingface_hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            path_in_repo=inside or None,
            commit_message=f"Upload {folder.name}",
        )
        return f"{folder} pushed to {address.commit_url}"
    except Exception as error:  # of the network, the server, its rules
        by_hand = " ".join(filter(None, ("hf upload", repository, str(folder), inside)))
        return f"{folder} is not pushed to {repository}: {error}; push it with '{by_hand}'"
