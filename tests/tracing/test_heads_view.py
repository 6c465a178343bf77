"""The grid of layers and heads shows the numbers of each head."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest
from small_traces import cells, roles_of, small_trace, text_of

from minigpt.errors import ConfigError
from minigpt.tracing.findings import HeadRows, Roles, Trace
from minigpt.tracing.spans import Line, percent
from minigpt.tracing.views import ViewOptions
from minigpt.tracing.views.heads import roles_grid, roles_table, show

TAGS = ("prev", "dup", "induc", "sink", "local", "")
NAMES = ("previous", "duplicate", "induction", "sink", "local")


def random_roles(n_layer: int, n_head: int) -> tuple[tuple[Roles, ...], ...]:
    """Different scores for each head, and a tag."""

    def role(layer: int, head: int) -> Roles:
        scores = {name: (layer * 17 + head * 5 + i * 3) % 90 / 100 for i, name in enumerate(NAMES)}
        return roles_of(tag=TAGS[(layer + head) % len(TAGS)], **scores)

    return tuple(tuple(role(layer, head) for head in range(n_head)) for layer in range(n_layer))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace(measure="both", has_heads=True)


def grid_of(lines: list[Line], cell_width: int, per_cell: int) -> dict[tuple[int, int], list[str]]:
    """The lines of the cell of each layer and head, parsed from the blocks."""
    found: dict[tuple[int, int], list[str]] = {}
    heads: list[int] = []
    texts = list(map(text_of, lines))
    for i, text in enumerate(texts):
        if text.startswith("layer"):
            heads = [int(n) for n in re.findall(r"\d+", text)]
        elif re.match(r" +\d+ ", text[:6]):
            for place, head in enumerate(heads):
                start = 6 + place * cell_width
                cell = [t[start : start + cell_width] for t in texts[i : i + per_cell]]
                assert (int(text[:6]), head) not in found
                found[int(text[:6]), head] = [part.strip() for part in cell]
    return found


@pytest.mark.parametrize("has_roles", [True, False])
@pytest.mark.parametrize("width", [40, 80])
def test_cells_are_means_over_the_steps(trace: Trace, width: int, has_roles: bool) -> None:
    roles = random_roles(2, 4) if has_roles else None
    one = replace(trace, header=replace(trace.header, roles=roles))
    lines = show(one, ViewOptions(width=width))
    grid = grid_of(lines, 8, 2 if has_roles else 1)
    assert len(grid) == 8
    for (layer, head), cell in grid.items():
        entropies, sinks = [], []
        for step in trace.steps:
            heads = step.row.heads
            assert heads is not None
            entropies.append(heads.entropy[layer, head])
            sinks.append(heads.sink[layer, head])
        numbers = f"{np.mean(entropies):.1f} {percent(float(np.mean(sinks)))}"
        assert cell[-1] == numbers
        if roles is not None:
            assert cell[0] == (roles[layer][head].tag or "·")
    assert f"{len(trace.steps)} tokens by weight" in " ".join(map(text_of, lines))


def test_columns_do_not_touch_with_over_100_heads_and_over_10_bits(trace: Trace) -> None:
    step = trace.steps[0]
    assert step.row.heads is not None
    repeated = {f.name: getattr(step.row.heads, f.name).repeat(28, 1) for f in fields(HeadRows)}
    heads = replace(HeadRows(**repeated), entropy=np.full((2, 112), 10.8, np.float32))
    row = replace(step.row, heads=heads, weights_S=np.zeros(1800, np.float32))
    steps = (replace(step, rows=(row,)),)
    lines = [
        *map(text_of, show(replace(trace, header=replace(trace.header, n_head=112), steps=steps)))
    ]
    titles = [i for i, line in enumerate(lines) if line.startswith("layer")]
    names = [name for i in titles for name in re.findall(r"\bh(?:ead )?\d+\b", lines[i])]
    assert len(names) == 112
    numbers = [number for i in titles for number in re.findall(r"\b10\.8\b", lines[i + 1])]
    assert len(numbers) == 112


def test_a_trace_without_rows_of_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="--view heads"):
        show(small_trace(max_new_tokens=2))
    # No option gives rows of single heads to a measure of the entire model.
    with pytest.raises(ConfigError, match=r"measure gradient .* --measure logit"):
        show(small_trace(max_new_tokens=2, measure="gradient"))


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize(("n_layer", "n_head"), [(1, 1), (2, 7), (12, 12), (2, 64)])
def test_the_grid_of_roles_has_every_head_and_fits(width: int, n_layer: int, n_head: int) -> None:
    roles = random_roles(n_layer, n_head)
    lines = roles_grid(roles, width)
    for line in lines:
        assert cells(text_of(line)) <= width
    grid = grid_of(lines, 6, 2)
    assert len(grid) == n_layer * n_head
    for (layer, head), (tag, score) in grid.items():
        role = roles[layer][head]
        assert tag == (role.tag or "·")
        by_tag = dict(zip(TAGS, NAMES, strict=False))
        scores = [getattr(role, by_tag[role.tag])] if role.tag else [
            getattr(role, name) for name in NAMES
        ]  # fmt: skip
        assert score == percent(max(scores)).strip()


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_table_of_roles_has_every_score(width: int) -> None:
    roles = random_roles(3, 5)
    heading, *lines = roles_table(roles, width)
    assert [name[:3] for name in text_of(heading).split()[1:6]] == [name[:3] for name in NAMES]
    assert len(lines) == 15
    for i, line in enumerate(lines):
        text = text_of(line)
        assert cells(text) <= width
        role = roles[i // 5][i % 5]
        assert text.split()[0] == f"{i // 5}.{i % 5}"
        assert re.findall(r"<1%|\d+%|\b100\b", text) == [
            percent(getattr(role, name)).strip() for name in NAMES
        ]
        assert text.endswith(role.tag)


def test_the_table_has_the_role_beside_the_effect_at_40_columns() -> None:
    roles = random_roles(2, 3)
    heading, *lines = roles_table(roles, 40, np.full((2, 3), -1.5, np.float32))
    assert text_of(heading).endswith(" logit role")
    for line, role in zip(lines, [role for layer in roles for role in layer], strict=True):
        assert cells(text_of(line)) <= 40
        assert text_of(line).endswith(f" -1.50 {role.tag}")
