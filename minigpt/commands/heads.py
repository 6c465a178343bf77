"""minigpt heads; the docstring of the command is its --help."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minigpt.commands.options import Fields, Json, ModelSource, Option, command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from minigpt.model.language_model import LanguageModel
    from minigpt.tracing.events import Roles
    from minigpt.tracing.spans import Line

_CELL_WIDTH = 14


@command
def heads(
    *,
    source: Annotated[ModelSource, Fields(without=("compile",))],
    view: Annotated[Literal["grid", "table"], Option("View", "Heads")] = "grid",
    ablate: Annotated[bool, Option("Measure the loss without each head", "Heads")] = False,
    seed: Annotated[int, Option("Seed of the random tokens", "Heads")] = 0,
    as_json: Json = False,
) -> None:
    """Show which known kind of head each head is.

    The model is given a few sequences of random tokens, each said twice, where it can foretell
    nothing but by looking. Scored is the share of a head's attention that goes to

    prev: the token before. dup: the earlier appearance of the same token. induc: the token after
    that appearance, which is the one that comes next. sink: position 0. local: itself and the few
    tokens before it.

    A head is called by the largest of the first three that is at least 40 %, else by the larger of
    the others that is at least 50 %, else by nothing.

    Where a head looks is not what it does: --ablate takes each head away in turn, and measures by
    how much worse the second saying is foretold (nats/token).
    """
    from minigpt.commands import output
    from minigpt.commands.loading import load_model
    from minigpt.console import make_console, print_lines
    from minigpt.tracing.analysis.roles import doubled_sequences, head_roles
    from minigpt.tracing.views.heads import roles_grid, roles_table

    folder, loaded = load_model(source)
    network = loaded.model
    roles = head_roles(network, seed=seed)
    effects_LH = _effects(network, seed) if ablate else None
    n_repeated = doubled_sequences(network, seed=seed).shape[1] // 2
    if as_json:
        output.write_json(
            {
                "model": str(folder),
                "seed": seed,
                "n_repeated": n_repeated,
                "heads": list(_records(roles, effects_LH)),
            }
        )
        return
    console = make_console(is_stderr=False)
    lines = (roles_table if view == "table" else roles_grid)(roles, console.width)
    lines += _legend(n_repeated, console.width)
    if effects_LH is not None:
        lines += _costs(effects_LH, console.width)
    print_lines(console, lines)


def _records(
    roles: "tuple[tuple[Roles, ...], ...]", effects_LH: "NDArray[np.float32] | None"
) -> Iterator[dict[str, Any]]:
    for layer, heads_of_layer in enumerate(roles):
        for head, role in enumerate(heads_of_layer):
            record = {"layer": layer, "head": head, **asdict(role)}
            if effects_LH is not None:
                record["loss_effect"] = float(effects_LH[layer, head])
            yield record


def _effects(model: "LanguageModel", seed: int) -> "NDArray[np.float32]":
    from minigpt.commands.progress_line import ProgressLine
    from minigpt.tracing.analysis.roles import head_effects

    n_heads = model.config.n_attention_layer * model.config.n_head
    with ProgressLine(label := "ablating heads") as line:

        def show(share: float) -> None:
            line.show(label, share, [f"{round(share * n_heads)} of {n_heads} heads"])

        return head_effects(model, seed=seed, progress=show)


def _legend(n_repeated: int, width: int) -> "Iterator[Line]":
    from minigpt.tracing.spans import wrapped

    yield []
    yield from wrapped(
        f"Shares of the attention, on {n_repeated} random tokens said twice. prev: on the token "
        "before; dup: on the same token's earlier appearance; induc: on the one after that; "
        "sink: on position 0; local: on itself and the few before.",
        width,
    )


def _costs(effects_LH: "NDArray[np.float32]", width: int) -> "Iterator[Line]":
    """Yield each head with what its absence costs, the costliest first."""
    from minigpt.tracing.spans import wrapped

    yield []
    yield from wrapped(
        "Without a head (layer.head), the second saying is foretold worse by so much, nats/token:",
        width,
    )
    order = effects_LH.argsort(axis=None)[::-1]
    n_head = effects_LH.shape[1]
    cells = [
        f"{f'{i // n_head}.{i % n_head}':<5} {effects_LH.flat[i]:+.3f}".ljust(_CELL_WIDTH)
        for i in order
    ]
    per_line = max(1, (width + 2) // _CELL_WIDTH)
    for first in range(0, len(cells), per_line):
        yield [("".join(cells[first : first + per_line]).rstrip(), "plain")]
