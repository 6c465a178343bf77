"""The options that several commands share, as typer annotations."""

from dataclasses import fields
from typing import Annotated, Any

import typer

from minigpt.config import SamplingConfig, build

_DEFAULTS = {f.name: f.default for f in fields(SamplingConfig)}


def _option(flag: str, text: str) -> Any:
    """Return an option of SamplingConfig; left out, the config's own default holds."""
    default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
    shown = str(default) if isinstance(default, int | float) else False
    return typer.Option(flag, help=text, show_default=shown)


Prompt = Annotated[
    str | None,
    typer.Argument(help="Text to continue; - reads standard input; none starts a new document"),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Run, checkpoint or Hugging Face folder, or a run's name",
        show_default="the newest run in checkpoints/",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32 or bfloat16; auto is float32 on a CPU")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

MaxNewTokens = Annotated[
    int | None, _option("--max-new-tokens", "Stop after so many generated tokens")
]
Temperature = Annotated[
    float | None, _option("--temperature", "Flatten (above 1) or sharpen; 0 is greedy")
]
TopK = Annotated[int | None, _option("--top-k", "Draw from the k most probable; 0 is off")]
TopP = Annotated[float | None, _option("--top-p", "Draw from the fewest that sum to p")]
MinP = Annotated[float | None, _option("--min-p", "Draw from those at least p times the best")]
RepetitionPenalty = Annotated[
    float | None, _option("--repetition-penalty", "Above 1 makes tokens already there rarer")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Of the draws", show_default="a fresh one, printed"),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; repeat for more", show_default=False),
]
NumSamples = Annotated[int | None, _option("--num-samples", "Continuations, one after another")]


def sampling_config(**values: Any) -> SamplingConfig:
    """Build a SamplingConfig of the options that were given.

    Raises: ConfigError for a value out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return build(SamplingConfig, given)
