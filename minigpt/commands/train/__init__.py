"""minigpt train; --help is the command's docstring and its text in help/texts.py."""

from typing import Annotated, Any, Literal

from minigpt.commands.options import (
    Assignments,
    ConfigFile,
    Data,
    Fields,
    Option,
    Preset,
    Threads,
    command,
)
from minigpt.config import RunConfig
from minigpt.presets import default_run
from minigpt.rings import ring
from minigpt.settings import layered, read_config_file

_GROUP = "Run"


@command
def train(
    data: Data = None,
    *,
    name: Annotated[
        str | None,
        Option("Folder in checkpoints/", _GROUP, metavar="NAME", shown="from text and preset"),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Annotated[dict[str, Any], Fields(RunConfig, defaults=default_run())],
    set_: Assignments = None,
    resume: Annotated[bool, Option("Resume --name, or the newest run", _GROUP)] = False,
    threads: Threads = None,
    dry_run: Annotated[bool, Option("Print the plan and do not train", _GROUP)] = False,
    as_json: Annotated[bool, Option("Print the plan as JSON", _GROUP, name="json")] = False,
    report_to: Annotated[
        Literal["tensorboard", "none"] | None,
        Option("Log metrics to", "Reports", shown="none, or as before with --resume"),
    ] = None,
) -> None:
    """Train a model from text.

    Writes checkpoints/NAME: one Hugging Face model folder per checkpoint, config.toml and
    metrics.jsonl. Ctrl-C saves a checkpoint and prints the command that resumes the run.

    Later settings win: preset, --config, options, --set. With --resume, the model, the text, the
    seed, the batch size, the optimizer and training.eval_tokens stay unchanged; everything else
    may change.
    """
    from minigpt.commands.loading import use_threads

    use_threads(threads)
    file = read_config_file(config)
    if "from" in layered(file, settings, assignments=set_):
        settings = ring("commands.train.finetune").with_sequence_length(settings)
    overrides = layered(file, settings, data, preset, set_)
    if report_to == "tensorboard":
        ring("training.metrics").summary_writer()  # before any long work
    if dry_run:
        ring("commands.train.plan").plan_training(name, overrides, resume=resume, is_json=as_json)
        return
    from minigpt.commands.train.run import run_training

    run_training(name, overrides, report_to, resume=resume, threads=threads)
