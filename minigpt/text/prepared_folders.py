"""Folders of tokens: one per corpus in the cache, and those that a user prepares.

An interrupted preparation is resumed.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.files import WRITING, locked, make_folder, resource_errors
from minigpt.text.building import Work, build_resumable, opened_corpus
from minigpt.text.corpus import Corpus, PrepareProgress
from minigpt.text.shard_files import (
    MANIFEST,
    UNFINISHED,
    VOCABULARY,
    Manifest,
    StoredData,
    is_ours,
    open_prepared,
    read_record,
    reading_prepared,
    write_json,
)
from minigpt.text.tokenizer import Tokenizer

_LOCK = ".lock"


def prepare(
    data: DataConfig,
    cache_dir: Path | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    chat_model: Path | None = None,
    n_workers: int = 0,
) -> StoredData:
    """Turn a corpus into tokens on disk, or open the result of an earlier call.

    Memory is bounded for any size of corpus. A killed preparation is resumed, or started again.
    A folder that the user prepared is opened as it is.

    Args: chat_model, model folder with the chat template for conversations, None for the plain
        template; n_workers, as for ``build_resumable``; others as in ``tokens.prepare``.
    Raises: ConfigError for an unknown tokenizer, or one that differs from a prepared folder's;
        DataError for an unusable corpus; ResourceError if permission to read a file is denied or
        the cache cannot be written.
    """
    _require_text(data.val)
    if named := prepared_folder(data.paths):
        prepared = open_prepared(named)
        _require_prepared_for(data, tokenizer, named, prepared.manifest)
    else:
        with opened_corpus(data, tokenizer, cache_dir, on_progress, chat_model) as corpus:
            prepared = _open_or_build(corpus, n_workers)
    if tokenizer is None:
        return prepared
    # The same vocabulary may have been stored under another name: return the one that was given.
    manifest = replace(prepared.manifest, tokenizer=tokenizer.name)
    return replace(prepared, tokenizer=tokenizer, manifest=manifest)


def _open_or_build(corpus: Corpus, n_workers: int) -> StoredData:
    """Open a corpus in the cache, after building it if it is missing or damaged."""
    folder = corpus.cache / "prepared" / corpus.identity[:32]
    with locked(Path(f"{folder}.lock")):
        with suppress(DataError):
            return _with_split(open_prepared(folder), corpus)
        aside = folder.with_name(f"{WRITING}{folder.name}")
        shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir(exist_ok=True)
        try:
            build_resumable(aside, corpus, n_workers)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return open_prepared(folder)


def prepare_folder(
    data: DataConfig,
    folder: Path,
    cache_dir: Path | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    chat_model: Path | None = None,
    n_workers: int = 0,
) -> tuple[StoredData, Work]:
    """Turn a corpus into tokens in a folder of the user, or resume an interrupted preparation.

    Complete shards survive any interruption; the same call then gives the same bytes.

    Args: folder, empty, missing, or begun by this function for the same corpus; others as in
        ``prepare``.
    Returns: the complete corpus, and the work of this call.
    Raises: ConfigError if the folder contains anything else; LockedError if another process is
        writing to it; and the errors of ``prepare``.
    """
    _require_text(data.val)
    if done := prepared_folder(data.paths):
        raise DataError(f"{str(done)!r} is already prepared. Train on it as it is.")
    others = [p.name for p in folder.glob("*") if not is_ours(p) and p.name != _LOCK]
    if others:
        raise ConfigError(
            f"the folder {str(folder)!r} contains {min(others)!r}, which minigpt prepare did not "
            "write. Name an empty or new folder."
        )
    busy = f"another process is preparing {str(folder)!r}. Wait, or name another --out."
    work = Work()
    with (
        opened_corpus(data, tokenizer, cache_dir, on_progress, chat_model) as corpus,
        resource_errors(folder, "name another --out"),
    ):
        make_folder(folder)
        with locked(folder / _LOCK, busy):
            if not _is_finished(folder, corpus.identity):
                try:
                    work = build_resumable(folder, corpus, n_workers)
                except BaseException:
                    tidy(folder)
                    raise
            else:
                found = open_prepared(folder)
                wanted = _with_split(found, corpus)
                if wanted.manifest != found.manifest:
                    write_json(folder / MANIFEST, asdict(wanted.manifest))
    return open_prepared(folder), work


def _with_split(prepared: StoredData, corpus: Corpus) -> StoredData:
    """Return prepared tokens with the split of a corpus, which may differ for the same tokens.

    Only a vocabulary of ``bpe`` and documents held out for validation depend on the split.
    """
    fraction = corpus.data.val_fraction
    manifest = replace(prepared.manifest, val_split=corpus.val_split, val_fraction=fraction)
    return replace(prepared, manifest=manifest)


def tidy(folder: Path) -> None:
    """Delete the files of an interrupted build that cannot be resumed."""
    if (folder / MANIFEST).exists():  # interrupted when the build was complete
        return
    kept = set()
    with suppress(DataError), reading_prepared(folder):
        kept = {shard.name for shard in read_record(folder / UNFINISHED)["shards"]}
    for path in folder.iterdir():
        if is_ours(path) and not (kept and path.name in (*kept, UNFINISHED, VOCABULARY)):
            path.unlink()


def _is_finished(folder: Path, identity: str) -> bool:
    """Return whether the folder contains the complete corpus.

    Raises: ConfigError if it contains another one, complete or not.
    """
    is_finished = (folder / MANIFEST).exists()
    path = folder / (MANIFEST if is_finished else UNFINISHED)
    if not path.exists():
        return False
    with reading_prepared(folder):
        found = read_record(path)["identity"]
    if found != identity:
        raise ConfigError(
            f"the folder {str(folder)!r} contains tokens of another text, tokenizer or validation "
            "split. Delete it, or name another --out."
        )
    return is_finished


def prepared_folder(words: Sequence[str]) -> Path | None:
    """Return the prepared folder that is named as a corpus; None if the words name text.

    Raises: DataError if its preparation is unfinished, or other texts are named too.
    """
    paths = [Path(os.path.expanduser(word)) for word in words]
    # os.path returns False for an invalid file name, for which Path raises.
    folders = [
        path
        for path in paths
        if os.path.isfile(path / VOCABULARY)
        and any(os.path.isfile(path / name) for name in (MANIFEST, UNFINISHED))
    ]
    if not folders:
        return None
    name = repr(str(folders[0]))
    if len(paths) > 1:
        raise DataError(
            f"{name} is a prepared corpus, which cannot be combined with others. Name it alone."
        )
    if not os.path.isfile(folders[0] / MANIFEST):
        raise DataError(f"the preparation of {name} is unfinished. Run minigpt prepare again.")
    return folders[0]


def _require_text(words: Sequence[str]) -> None:
    """Raise DataError if the validation text is a prepared folder."""
    if named := prepared_folder(words):
        raise DataError(
            f"{str(named)!r} is a prepared corpus, which cannot be --val. Name its text, or "
            "prepare both texts together: minigpt prepare DATA --val TEXT --out DIR."
        )


def prepared_settings(data: DataConfig) -> dict[str, Any]:
    """Return the data settings of a prepared folder; {} if ``data`` names text.

    Raises: DataError as for ``prepared_folder``, or if it is damaged.
    """
    folder = prepared_folder(data.paths)
    if folder is None:
        return {}
    with reading_prepared(folder):
        manifest = Manifest(**read_record(folder / MANIFEST))
    settings: dict[str, Any] = {"tokenizer": manifest.tokenizer}
    if manifest.chat_template:
        settings |= {"chat": True, "loss_on": manifest.loss_on}
    if manifest.val_split == "none":
        return settings | {"val_fraction": 0.0}
    if manifest.val_split == "own" or data.val:  # another text to validate on is refused later
        return settings
    return settings | {"val_split": manifest.val_split, "val_fraction": manifest.val_fraction}


def _require_prepared_for(
    data: DataConfig, tokenizer: Tokenizer | None, folder: Path, manifest: Manifest
) -> None:
    """Raise ConfigError if a folder was prepared with other settings or another tokenizer."""
    if data.special and not manifest.special:
        raise ConfigError(
            f"{str(folder)!r} was prepared without --special. Prepare the text again with it, or "
            "leave it out here."
        )
    if manifest.chat_template and not data.chat:
        also = "" if manifest.loss_on == "completion" else f" --loss-on {manifest.loss_on}"
        raise ConfigError(f"{str(folder)!r} contains conversations. Give --chat{also}.")
    if data.chat != bool(manifest.chat_template) or (data.loss_on or "all") != manifest.loss_on:
        raise ConfigError(
            f"{str(folder)!r} was not prepared with this --chat or --loss-on. Prepare the rows "
            "again with them, or leave them out here."
        )
    if data.chat_template is not None:
        raise ConfigError(
            f"{str(folder)!r} was prepared with a chat template. Leave --chat-template out."
        )
    if tokenizer is None and manifest.tokenizer != data.tokenizer:
        raise ConfigError(
            f"{str(folder)!r} was prepared with the tokenizer {manifest.tokenizer!r}, not "
            f"{data.tokenizer!r}. Leave --tokenizer out, or prepare the text again."
        )
    if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{str(folder)!r} was prepared with the tokenizer {manifest.tokenizer!r}, not "
            "with the model's. Prepare the text with minigpt prepare --from."
        )
    default = DataConfig()
    for name in ("format", "field", "encoding", "skip_bad", "skip_unencodable"):
        if getattr(data, name) != getattr(default, name):
            raise ConfigError(
                f"{name} has no effect on {str(folder)!r}, which is already prepared. Leave it "
                "out, or prepare the text again with it."
            )
    _require_same_split(data, folder, manifest)


def _require_same_split(data: DataConfig, folder: Path, manifest: Manifest) -> None:
    """Raise ConfigError for validation on another text than was held out when preparing."""
    kind = "tail" if manifest.val_split == "none" else manifest.val_split
    target = {"tail": "its tail", "documents": "some of its documents", "own": "another text"}[kind]
    is_other = bool(data.val) or (data.val_split or kind) != kind
    if kind == "documents":
        is_other |= data.val_fraction != manifest.val_fraction
        target += f", {manifest.val_fraction:g} of its bytes"
    if is_other and data.val_fraction:
        raise ConfigError(
            f"{str(folder)!r} was prepared to validate on {target}. Leave --val, --val-split "
            "and --val-fraction out, or prepare the text again with them."
        )
