"""minigpt claims; the command's docstring is its --help."""

from pathlib import Path
from typing import Annotated

from minigpt.commands.options import Fields, Json, ModelSource, Option, argument, command
from minigpt.errors import require_choice
from minigpt.studies.claims import CLAIMS


@command
def claims(
    which: Annotated[
        list[str] | None, argument("CLAIM", f"{', '.join(CLAIMS[:-1])} or {CLAIMS[-1]} [all]")
    ] = None,
    *,
    quick: Annotated[bool, Option("Train smaller models for about a minute", "Size")] = False,
    seeds: Annotated[int, Option("Number of models of each kind", "Size", bounds="[1, 1000]")] = 1,
    source: Annotated[ModelSource, Fields(only=("device", "threads"), group="Size")],
    out: Annotated[
        Path | None, Option("Folder for pictures and claims.json", "Output", metavar="FOLDER")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure common claims about attention.

    long-range: an LSTM, an LSTM with attention and a Transformer of equal size learn to recall the
    value of a key, and to copy a string, over growing distances. explainable: the source of each
    answer is known; is it the most attended position, and how accurate is the answer without it?
    parallel: training speed of an LSTM and a Transformer against sequence length.

    Each ends with a verdict: whether the numbers support the claim, and where they do not. All
    three together take a quarter of an hour on two CPU cores.

    Pictures need matplotlib: pip install 'minigpt-attention[plot]'.
    """
    wanted = list(dict.fromkeys(which or CLAIMS))
    for name in wanted:
        require_choice("claim", name, CLAIMS)
    from minigpt import console
    from minigpt.commands.claims.views import prepare_folder, show_finding, write_findings
    from minigpt.commands.display.progress import ProgressLine
    from minigpt.commands.loading import use_threads

    if out is not None:
        prepare_folder(out)
        console.outlive_reader()
    from minigpt.model.device import resolve_device
    from minigpt.studies.claims.learning import QUICK, Progress, Size
    from minigpt.studies.claims.study import Study

    use_threads(source.threads)
    size = QUICK if quick else Size()
    study = Study(size, seeds=range(seeds), device=resolve_device(source.device))
    findings = []
    for claim in wanted:
        with ProgressLine(claim) as line:
            for event in study.measure(claim):
                if isinstance(event, Progress):
                    line.show_task(event.label, event.share, event.details)
                else:
                    findings.append(event)
        show_finding(findings[-1], as_json=as_json)
        if out is not None:
            write_findings(out, findings)
    if out is not None:
        console.note(f"wrote {out}")
