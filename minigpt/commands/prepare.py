"""minigpt prepare; the command's docstring is its --help."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from minigpt.commands.options import Data, Fields, Json, Option, command
from minigpt.config import DataConfig
from minigpt.errors import ConfigError
from minigpt.presets import default_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from minigpt.text.building import Work
    from minigpt.text.shard_files import Manifest

_DEFAULTS = default_run().data


@command
def prepare(
    data: Data = None,
    *,
    out: Annotated[Path, Option("Folder for the tokens, empty or new", "Run", metavar="DIR")],
    settings: Annotated[dict[str, Any], Fields(DataConfig, group="Run", defaults=_DEFAULTS)],
    from_: Annotated[
        str | None, Option("Model whose tokenizer to use: a folder or a run", "Run", "MODEL")
    ] = None,
    workers: Annotated[
        int | None,
        Option("Number of threads", "Run", shown="by the number of cores", bounds="[1, 1024]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenize text before training.

    minigpt train DIR then accepts the folder in place of text. Training also tokenizes its text,
    into a cache; use this command for text that takes long, is trained on elsewhere, or may be
    interrupted: run again, it continues and writes the same files.

    The tokens are written in shards of 17 million each.
    """
    if "tokenizer" in settings and from_ is not None:
        raise ConfigError("--from brings its own tokenizer. Leave --tokenizer out.")
    from minigpt import console
    from minigpt.commands import tables
    from minigpt.commands.display.progress import ProgressLine
    from minigpt.commands.help.usage import note_without_effect
    from minigpt.commands.process import command_line
    from minigpt.settings import build, to_dict
    from minigpt.text.prepared_folders import prepare_folder

    config = build(DataConfig, to_dict(_DEFAULTS) | ({"paths": data} if data else {}) | settings)
    note_without_effect(config, settings)
    folder = out.expanduser()
    tokenizer = base_folder = None
    if from_ is not None:
        from minigpt.commands.train.finetune import read_base

        base = read_base(from_)
        tokenizer, base_folder = base.tokenizer, base.folder
    with ProgressLine("reading") as progress:
        prepared, work = prepare_folder(
            config,
            folder,
            on_progress=progress.preparing,
            tokenizer=tokenizer,
            chat_model=base_folder,
            n_workers=workers or 0,
        )
    for line in prepared.manifest.notes():
        console.note(f"note   {line}")
    if as_json:
        tables.write_json(_record(folder, prepared.manifest, work))
    else:
        tables.show(_lines(folder, prepared.manifest, work))
        model = () if from_ is None else ("--from", from_)
        console.note(f"next    {command_line('train', str(folder), *model)}")


def _record(folder: Path, manifest: "Manifest", work: "Work") -> dict[str, Any]:
    return {
        "folder": folder,
        "n_documents": manifest.n_documents,
        "n_bytes": manifest.n_bytes,
        "n_tokens": manifest.n_tokens,
        "n_skipped": manifest.n_skipped,
        "n_bad_rows": manifest.n_bad_rows,
        "bytes_per_token": manifest.n_bytes / manifest.n_tokens,
        "tokenizer": manifest.tokenizer,
        "n_shards": len(manifest.shards),
        "n_bytes_encoded": work.n_bytes,
        "seconds": work.seconds,
        "mb_per_s": work.n_bytes / 1e6 / work.seconds if work.seconds else None,
    }


def _lines(folder: Path, manifest: "Manifest", work: "Work") -> "Iterator[Text]":
    from minigpt.commands.tables import fact_lines
    from minigpt.format import count, with_unit
    from minigpt.text.escape import one_line

    speed = "all tokens existed already"
    if work.seconds:
        rest = "; the rest existed already" if work.n_bytes < manifest.n_bytes else ""
        speed = f"{work.n_bytes / 1e6 / work.seconds:.3g} MB/s: {with_unit(work.n_bytes, 'B')} in "
        speed += f"{work.seconds:.1f} s{rest}"
    return fact_lines(
        {
            "folder": one_line(str(folder)),
            "text": f"{count(manifest.n_bytes, 'byte')}, {count(manifest.n_documents, 'document')}",
            "tokens": f"{manifest.n_tokens:,} ({one_line(manifest.tokenizer)}), "
            f"{manifest.n_bytes / manifest.n_tokens:.3f} bytes/token",
            "speed": speed,
        }
    )
