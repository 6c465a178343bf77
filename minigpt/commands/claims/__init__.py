"""minigpt claims; the docstring of the command is its --help."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt.commands import options
from minigpt.errors import ConfigError, nearest

_CLAIMS = ("long-range", "explainable", "parallel")


def claims(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLAIM",
            help=f"{', '.join(_CLAIMS[:-1])} or {_CLAIMS[-1]} [all]",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A look in a minute: less is learned", rich_help_panel="Size"),
    ] = False,
    seeds: Annotated[
        int | None,
        options.number("--seeds", int, "Models of each kind", group="Size", default=1),
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    out: Annotated[
        str | None,
        options.option(
            "--out", "Write pictures and claims.json there", group="Output", metavar="FOLDER"
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure what is claimed of attention.

    long-range: small models learn to recall the value of a key, and to copy a string, from fillers
    away; an LSTM, an LSTM with attention and a Transformer, of equal size. explainable: the source
    of each answer is known: is it the most attended position, and what is the answer worth without
    it? parallel: training speed against the length of sequences, LSTM and Transformer.

    Each ends with whether its numbers bear it out, and where they do not. All together take a
    quarter of an hour on two CPU cores.

    Pictures need matplotlib (the extra plot).
    """
    wanted = list(dict.fromkeys(which or _CLAIMS))
    for name in wanted:
        if name not in _CLAIMS:
            raise ConfigError(f"there is no claim {name!r}. {nearest(name, _CLAIMS)}")
    n_seeds = 1 if seeds is None else seeds
    if n_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1: it is {n_seeds}.")
    from minigpt.commands.claims.views import prepare_folder, show_finding, write_findings
    from minigpt.commands.loading import use_threads
    from minigpt.commands.progress_line import ProgressLine

    folder = None if out is None else prepare_folder(Path(out))
    from minigpt.model.device import resolve_device
    from minigpt.studies.claims.learning import Progress
    from minigpt.studies.claims.study import DEFAULT, QUICK, Study

    use_threads(threads)
    study = Study(
        QUICK if quick else DEFAULT, seeds=range(n_seeds), device=resolve_device(device or "auto")
    )
    findings = []
    for claim in wanted:
        with ProgressLine(claim) as line:
            for event in study.measure(claim):
                if isinstance(event, Progress):
                    line.show(event.label, event.share, event.facts)
                else:
                    findings.append(event)
        show_finding(findings[-1], as_json=as_json)
        if folder is not None:
            write_findings(folder, findings)
