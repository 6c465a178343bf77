"""minigpt measures; the command's docstring is its --help."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from minigpt.commands.options import Fields, Json, ModelSource, Option, Prompt, PromptForm, command
from minigpt.config import SamplingConfig
from minigpt.tracing.analysis_config import AnalysisConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minigpt.tracing.analysis.faithfulness import Comparison, Interval
    from minigpt.tracing.spans import Line

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "num_samples")
_COLUMNS = {
    "rank_correlation": ("rank corr.", "rank correlation with the exact effects"),
    **{f"top_{k}": (f"top {k}", f"share of the total effect, top {k}") for k in (1, 3, 5)},
    "deletion": ("deletion", "deletion: mean drop in p"),
}
"""Metric -> its titles in the table and in the picture."""
_CELL_WIDTH = 22  # "-0.28 [-0.48, -0.08]" and a gap


@command
def measures(
    prompt: Prompt = None,
    *,
    form: PromptForm,
    source: Annotated[ModelSource, Fields(without=("compile",))],
    sampling: Annotated[SamplingConfig, Fields(only=_SAMPLING)],
    config: Annotated[AnalysisConfig, Fields(only=("knockout", "sink"), group="Measures")],
    only: Annotated[
        str | None, Option("Measures to compare, as in weight,norm", "Measures", "LIST", "all")
    ] = None,
    picture: Annotated[
        Path | None, Option("Draw the table as .svg, .png or .pdf", "Output")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare measures of attention with exact effects.

    The model continues the prompt. For each generated token, each earlier position except the sink
    is knocked out for the query that predicted it, and the absolute change in ln p is its exact
    effect. Each measure ranks the same positions by its absolute value:

    rank corr.: Spearman correlation with the exact effects, within a token. top 1, 3, 5: share of
    the total effect at the measure's top 1, 3 and 5 positions. deletion: drop in the token's
    probability when the top 1, 5, 10, 20 or 50% of the positions are knocked out, averaged over
    these shares (comprehensiveness, DeYoung et al. 2020); larger is better.

    Numbers are means over tokens, with 95% bootstrap intervals. Controls: distance ranks the
    nearest position first, random in a random order, exact by the exact effects themselves.

    --picture needs matplotlib: pip install 'minigpt-attention[plot]'.
    """
    from minigpt.commands.display.progress import ProgressLine
    from minigpt.commands.loading import load, show_model
    from minigpt.commands.tables import write_json
    from minigpt.console import make_console, note
    from minigpt.figures import require_matplotlib, write_figure
    from minigpt.generation.decoder import fresh_seed
    from minigpt.styles import print_lines
    from minigpt.tracing.analysis.faithfulness import choose_measures, compare_measures

    chosen = None if only is None else choose_measures(only)
    if picture is not None:
        require_matplotlib(picture, what="--picture")
    prompted = load(source, prompt, form)
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    with ProgressLine() as line:

        def show(share: float, what: str) -> None:
            if not line.line.label:  # before minutes of work on what may be the wrong model
                show_model(prompted.folder)
                note(f"seed {seed}")
            line.show_task(what, share, [f"{share:.0%}"])

        comparison = compare_measures(
            prompted.model,
            prompted.tokenizer,
            prompted.prompt,
            sampling,
            config,
            measures=chosen,
            seed=seed,
            progress=show,
        )
    for name, why in comparison.left_out.items():
        note(f"{name} is left out: {why}")
    if picture is not None:
        write_figure(picture, lambda: _figure(comparison))
        note(f"wrote {picture}")
    if as_json:
        write_json({"model": str(prompted.folder), "seed": seed, **asdict(comparison)})
    else:
        console = make_console(is_stderr=False)
        print_lines(console, _table(comparison, console.width))


def _table(comparison: "Comparison", width: int) -> "list[Line]":
    """Return a line for each ranking, with as many columns as fit."""
    from minigpt.format import count
    from minigpt.tracing.analysis.faithfulness import CONTROLS
    from minigpt.tracing.wrapping import wrapped

    names = [result.name for result in comparison.results]
    name_width = max(map(len, names)) + 2
    per_part = max(1, (width - name_width) // _CELL_WIDTH)
    columns, lines = list(_COLUMNS), []
    for first in range(0, len(columns), per_part):
        part = columns[first : first + per_part]
        title = " " * name_width + "".join(_COLUMNS[name][0].ljust(_CELL_WIDTH) for name in part)
        lines += [*([[]] if first else []), [(title.rstrip(), "dim")]]
        for result in comparison.results:
            cells = "".join(_cell(result.metrics[name]).ljust(_CELL_WIDTH) for name in part)
            style = "dim" if result.name in CONTROLS else "plain"
            lines.append([(result.name.ljust(name_width) + cells.rstrip(), style)])
    about = (
        f"{count(comparison.n_tokens, 'token')}, {comparison.mean_positions:.0f} positions each on "
        f"average, {comparison.n_knockouts} knockouts; means, with 95% intervals in brackets."
    )
    return [*lines, [], *wrapped(about, width)]


def _cell(interval: "Interval | None") -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:z.2f} [{interval.low:z.2f}, {interval.high:z.2f}]"


def _figure(comparison: "Comparison") -> "Figure":
    """Draw a panel for each column: a point and its interval for each ranking."""
    from matplotlib.figure import Figure

    from minigpt.tracing.analysis.faithfulness import CONTROLS

    height = 1 + 0.3 * len(comparison.results)
    figure = Figure(figsize=(14, height), layout="constrained")
    panels = figure.subplots(1, len(_COLUMNS), sharey=True, squeeze=False)[0]
    names = [result.name for result in comparison.results][::-1]
    for panel, (metric, (_, title)) in zip(panels, _COLUMNS.items(), strict=True):
        for place, result in enumerate(comparison.results[::-1]):
            color = "0.6" if result.name in CONTROLS else "C0"
            if interval := result.metrics[metric]:
                panel.plot([interval.low, interval.high], [place, place], color=color)
                panel.plot([interval.mean], [place], "o", color=color)
        panel.set_title(title, fontsize="small")
        panel.set_yticks(range(len(names)), names)
        panel.axvline(0, color="0.85", zorder=0)
    return figure
