"""`--push ORG/NAME`: what was written goes to the hub, when that is asked for, into a private repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from counterpoise.checkpoints.files import first_line
from counterpoise.cli.help import general
from counterpoise.cli.terminal import say

Push = Annotated[
    str | None, general("ORG/NAME", "Also upload OUT to the hub; a repository that is new is private.", "--push")
]


def check_push(name: str | None) -> None:
    """Refuse a name or a login that will not do, before the work.

    Raises:
        ValueError: not a repository's name, or nobody is logged in.
    """
    if name is None:
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"--push: expected ORG/NAME, found {name!r}")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        told = first_line(error)
        raise ValueError(f"--push: expected a login of the hub, found none ({told}); `hf auth login`") from None


def push(folder: Path, name: str | None) -> None:
    """Upload a folder.

    Raises:
        ValueError: the hub refused it; the folder is kept.
    """
    if name is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Made by counterpoise")
    except (HfHubHTTPError, OSError) as error:
        told = first_line(error)
        raise ValueError(
            f"--push: {folder} is whole, but the hub did not take it ({told}); `hf upload {name} {folder}`"
        ) from None
    say(f"pushed to {done.repo_url}")
