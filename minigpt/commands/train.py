"""minigpt train."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.commands import options

# Where each flag's value belongs in RunConfig.
_FLAG_PLACES = {
    "tokenizer": "data",
    "context_length": "model",
    "family": "model",
    "n_layer": "model",
    "n_head": "model",
    "d_model": "model",
    "lr": "training",
    "max_steps": "training",
    "max_minutes": "training",
    "batch_size": "training",
    "seed": "training",
    "device": "training",
    "dtype": "training",
    "compile": "training",
    "eval_every": "training",
    "save_every": "training",
    "sample_every": "training",
}


def train(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs, .jsonl, - for standard input, or shakespeare",
            show_default="English prose that comes with Python",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The run's folder in checkpoints/", show_default="corpus-preset"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="nano, mini or small", show_default="nano")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bytes, bpe:N (trained here), gpt2, cl100k_base or o200k_base",
            show_default="the preset's",
        ),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps", show_default="the preset's")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of training; the schedule ends with it", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per step", show_default="the preset's")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the model sees", show_default="the preset's")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Block layout: llama or gpt2", show_default="llama")
    ] = None,
    n_layer: Annotated[int | None, typer.Option(help="Blocks", show_default=False)] = None,
    n_head: Annotated[int | None, typer.Option(help="Query heads", show_default=False)] = None,
    d_model: Annotated[int | None, typer.Option(help="Width", show_default=False)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate", show_default="the preset's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order and dropout")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps", show_default="auto")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32 or bfloat16; auto is bfloat16 where it is fast", show_default="auto"
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Use torch.compile", show_default="no-compile"),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between validation passes", show_default=False)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints", show_default=False)
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between printed samples", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run: --name, or the newest")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Settings from a TOML file", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, as in model.n_layer=4; repeat", show_default=False
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Train a model from text.

    Writes checkpoints/NAME: a Hugging Face model folder per checkpoint, config.toml and
    metrics.jsonl. Later settings win: preset, --config, flags, --set.
    """
    flags = {key: value for key, value in locals().items() if key in _FLAG_PLACES}
    overrides = _overrides(data, flags, config, set_ or [])
    from minigpt.commands.training_run import resume_run, start_run

    if resume:
        resume_run(name, overrides)
    else:
        start_run(name, preset, overrides)


def _overrides(
    data: list[str] | None, flags: dict[str, Any], config: Path | None, assignments: list[str]
) -> dict[str, Any]:
    """Return what the user asked for beyond the preset, nested as in RunConfig."""
    from minigpt.config import merge, parse_assignment, read_toml

    given: dict[str, Any] = {}
    for flag, value in flags.items():
        if value is not None:
            given.setdefault(_FLAG_PLACES[flag], {})[flag] = value
    if data:
        given.setdefault("data", {})["paths"] = data
    layers = [read_toml(config)] if config else []
    layers += [given, *(parse_assignment(text) for text in assignments)]
    return merge(*layers)
