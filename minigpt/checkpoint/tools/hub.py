"""Download models from the Hugging Face Hub: only the files that read_model reads, no pickles."""

import re
from pathlib import Path
from typing import Any

from minigpt.checkpoint.carried import CARRIED
from minigpt.checkpoint.model_folder import CONFIG, WEIGHTS
from minigpt.checkpoint.tools.weight_files import INDEX, shard_names
from minigpt.errors import CheckpointError, MinigptError, install_extra
from minigpt.files import resource_errors

HUB_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)
"""Repository on the Hugging Face Hub: org/name or org/name@revision."""

# Third-party code is not downloaded; from a local folder it is copied, but never run.
_SMALL_FILES = [CONFIG, INDEX, *(name for name in CARRIED if name != "*.py")]
_LOG_IN = "log in with `hf auth login`"


def is_hub_name(spec: str) -> bool:
    """Return whether a text could name a repository: org/name or org/name@revision."""
    return HUB_NAME.fullmatch(spec) is not None


def download_model(spec: str) -> Path:
    """Download a repository's model, unless it is in the Hub's cache, and return its folder.

    Without a network, or with HF_HUB_OFFLINE, the cached files are used. huggingface_hub shows its
    progress on stderr if that is a terminal.

    Args: spec, org/name or org/name@revision (a branch, a tag or a commit).
    Raises: CheckpointError if huggingface_hub is not installed, the repository cannot be
        downloaded, or it has no safetensors; ResourceError if the cache cannot be written.
    """
    match = HUB_NAME.fullmatch(spec)
    assert match is not None, f"{spec!r} is not a name of the Hub"
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise CheckpointError(
            f"{spec!r} is not a folder here. If it is a model on the Hugging Face Hub, install "
            f"huggingface_hub: {install_extra('hub')}."
        ) from None
    # Its warnings include the server's reply unescaped.
    logging.set_verbosity_error()
    try:
        with resource_errors(Path(constants.HF_HUB_CACHE)):
            path = snapshot_download(
                match["repository"],
                revision=match["revision"],
                allow_patterns=_SMALL_FILES,
                tqdm_class=_progress_bar(),
            )
            folder = Path(path)  # its name is the commit
            names = [WEIGHTS]
            if (folder / INDEX).exists():  # which may list pickles
                names = [n for n in shard_names(folder / INDEX) if n.endswith(".safetensors")]
            for name in names:
                # Not in snapshot_download's threads: Ctrl-C would wait until they are done.
                hf_hub_download(match["repository"], name, revision=folder.name)
    except MinigptError:
        raise
    except Exception as error:  # network errors have no common class across its versions
        problem = _problem(error, match["repository"], match["revision"])
        raise CheckpointError(f"{spec!r} is not a folder here, and {problem}") from error
    return folder


def _progress_bar() -> Any:
    from huggingface_hub.utils.tqdm import tqdm

    class TerminalBar(tqdm):
        """A progress bar that is shown only if stderr is a terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": None})

    return TerminalBar


def _problem(error: Exception, repository: str, revision: str | None) -> str:
    """Return why a download failed, and the remedy."""
    from huggingface_hub import constants, errors

    hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"its repository is gated. Accept the terms at {page}, and {_LOG_IN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no such repository. Check the name; if it is private, {_LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"its repository has no revision {revision!r}. Name a branch, a tag or a commit."
    if isinstance(error, errors.HFValidationError):
        return "it is not a valid repository name. Check it."
    is_local = isinstance(error, errors.LocalEntryNotFoundError)  # a kind of EntryNotFoundError
    if isinstance(error, errors.EntryNotFoundError) and not is_local:
        return (
            f"its repository has no {WEIGHTS}, or not all of its parts. Weights in pickles (.bin, "
            ".pt) can run any code and are not downloaded: choose another repository, or convert "
            f"them with `hf download {repository} --local-dir OLD` and `minigpt checkpoints import "
            "OLD NEW`."
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE allows only the Hub's cache, where some of its files are missing. "
            "Unset it to download them."
        )
    if response is not None:
        return f"{hub} answered {response.status_code}. Try again later, or {_LOG_IN}."
    if is_local:
        return (
            f"{hub} cannot be reached ({type(cause).__name__}). Check the network, or get the "
            "folder another way and name it."
        )
    return f"the download failed ({type(error).__name__}: {str(error)[:120]!r}). Try again."
