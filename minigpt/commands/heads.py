"""minigpt heads; the command's docstring is its --help."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from minigpt.commands.options import Fields, Json, ModelSource, Option, command
from minigpt.rings import ring

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from minigpt.model.language_model import LanguageModel
    from minigpt.tracing.spans import Line

_CELL_WIDTH = 14
_LEGEND = (
    "Shares of attention on {n_repeated} random tokens followed by a copy. prev: to the previous "
    "token; dup: to the same token in the first copy; induc: to the token after that; sink: to "
    "position 0; local: to the token itself and the few before it. ·: no role; the share is the "
    "largest of these five."
)
_LOGIT_LEGEND = (
    " With a sign: the head's direct effect on the logit of the correct next token, averaged over "
    "the copy."
)


@command
def heads(
    *,
    source: Annotated[ModelSource, Fields(without=("compile",))],
    view: Annotated[Literal["grid", "table"], Option("View", "Heads")] = "grid",
    ablate: Annotated[bool, Option("Measure the loss without each head", "Heads")] = False,
    seed: Annotated[int, Option("Seed of the random tokens", "Heads")] = 0,
    as_json: Json = False,
) -> None:
    """Show the role of each attention head.

    The model reads sequences of random tokens, each followed by a copy of itself. The second copy
    can only be predicted by attending to the first. A head's scores are the shares of its attention
    that go to

    prev: the previous token. dup: the earlier occurrence of the same token. induc: the token after
    that occurrence, which is the one to predict (induction head). sink: position 0. local: the
    token itself and the few before it.

    The role is the largest of the first three scores if it is at least 40%, otherwise the larger
    of the last two if it is at least 50%, otherwise none.

    The signed number is the head's mean direct effect on the logit of the correct next token in the
    copy (direct logit attribution), for models whose logits are a sum of such effects.

    Where a head attends does not show what it does: --ablate zeroes the output of one head at a
    time and measures how much the loss on the second copy increases (nats/token).
    """
    from minigpt.commands import tables
    from minigpt.commands.loading import load_model, show_model
    from minigpt.console import make_console
    from minigpt.styles import print_lines
    from minigpt.tracing.analysis.roles import head_logits, head_roles, repeated_sequences
    from minigpt.tracing.wrapping import wrapped

    loaded = load_model(source)
    roles = head_roles(loaded.model, seed=seed)
    logits_LH = head_logits(loaded.model, seed=seed)
    show_model(loaded.folder)
    effects_LH = _ablated(loaded.model, seed, sum(map(len, roles))) if ablate else None
    n_repeated = repeated_sequences(loaded.model, seed=seed).shape[1] // 2
    if as_json:
        measured = {"logit_effect": logits_LH, "loss_effect": effects_LH}
        records = [
            {"layer": layer, "head": head, **asdict(role)}
            | {n: float(f_LH[layer, head]) for n, f_LH in measured.items() if f_LH is not None}
            for layer, roles_H in enumerate(roles)
            for head, role in enumerate(roles_H)
        ]
        record = {
            "model": str(loaded.folder),
            "seed": seed,
            "n_repeated": n_repeated,
            "heads": records,
        }
        tables.write_json(record)
        return
    console = make_console(is_stderr=False)
    views = ring("tracing.views.heads")
    draw = views.roles_table if view == "table" else views.roles_grid
    legend = _LEGEND.format(n_repeated=n_repeated)
    if logits_LH is not None:
        legend += _LOGIT_LEGEND
    lines = [*draw(roles, console.width, logits_LH), [], *wrapped(legend, console.width)]
    if effects_LH is not None:
        title = "Increase in loss on the second copy without each head (layer.head), nats/token:"
        lines += [[], *wrapped(title, console.width), *_costs(effects_LH, console.width)]
    print_lines(console, lines)


def _ablated(model: "LanguageModel", seed: int, n_heads: int) -> "NDArray[np.float32]":
    """Return the increase in loss without each head, (L, H), and show the progress on stderr."""
    from minigpt.commands.display.progress import ProgressLine
    from minigpt.tracing.analysis.roles import head_effects

    with ProgressLine(label := "ablating heads") as line:

        def show(share: float) -> None:
            line.show_task(label, share, [f"{round(share * n_heads)} of {n_heads} heads"])

        return head_effects(model, seed=seed, progress=show)


def _costs(effects_LH: "NDArray[np.float32]", width: int) -> "list[Line]":
    """Return each head with the increase in loss without it, largest first."""
    n_head = effects_LH.shape[1]
    cells = [
        f"{f'{i // n_head}.{i % n_head}':<5} {effects_LH.flat[i]:+z.3f}".ljust(_CELL_WIDTH)
        for i in effects_LH.argsort(axis=None)[::-1]
    ]
    per_line = max(1, (width + 2) // _CELL_WIDTH)
    rows = (cells[i : i + per_line] for i in range(0, len(cells), per_line))
    return [[("".join(row).rstrip(), "plain")] for row in rows]
