"""Lines of a trace about knockouts, head roles, alternatives and candidates.

``tracing.lines`` and ``tracing.summary`` call this module if a trace has any of these.
"""

import math
from collections.abc import Sequence

from minigpt.format import count
from minigpt.text.escape import token_name
from minigpt.tracing.analysis_config import KNOCKOUTS, Measure, facts_of
from minigpt.tracing.findings import (
    ROLE_SCORES,
    Candidate,
    CauseCheck,
    Effect,
    Lens,
    TraceHeader,
    TraceStep,
    shown_probability,
)
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.spans import SHARE_WIDTH, Line, cell_len, encodable, fit, heat, percent
from minigpt.tracing.wrapping import SIGNED_WIDTH, signed, upright_bar, wrapped

_WITHOUT = "ln p without"
_ALONE = "kept alone"
_WEAK = 0.3
"""Rank correlation below which a measure says little about effects."""


def header_lines(header: TraceHeader, width: int) -> list[Line]:
    """Return the lines of a header about alternatives, roles and knockouts."""
    lines: list[Line] = []
    if header.against is not None:
        text = f"the logit of each token minus that of {token_name(header.against.data)}"
        lines += wrapped(text, width, label="against  ")
    if header.roles is not None:
        label = "role     " if header.selection.n_chosen == 1 else "roles    "
        lines += wrapped(_roles_in_words(header), width, label=label)
    if header.n_verified:
        where = "" if header.verified_heads is None else f" in {header.verified_heads.as_text()}"
        how = f"knocked out{where}"
        if header.n_verified == "all":
            text = (
                f"each position is {how} ({KNOCKOUTS[header.knockout]}); below a token, the "
                "largest changes of its ln p"
            )
        else:
            n = header.n_verified
            sources, near = f"the {n} strongest sources of each token are", "each"
            if n == 1:
                sources, near = "the strongest source of each token is", "it"
            text = (
                f"{sources} {how}, and a control near {near} ({KNOCKOUTS[header.knockout]}); below "
                "a token, the change of ln p without a source vs without its control, and with "
                "the sources and the sink alone"
            )
        lines += wrapped(text, width, label="verify   ")
    return lines


def _roles_in_words(header: TraceHeader) -> str:
    """Describe the scores of the chosen head, or list the chosen heads by role."""
    roles, by_layer = header.roles or (), header.selection.heads_by_layer
    chosen = [(layer, head) for layer, heads in enumerate(by_layer) for head in heads]
    if len(chosen) == 1:
        [(layer, head)] = chosen
        role = roles[layer][head]
        scores = ", ".join(f"{name} {getattr(role, name):.0%}" for name in ROLE_SCORES)
        return f"{role.tag or 'none'}: {scores}"
    by_tag: dict[str, list[str]] = {}
    for layer, head in chosen:
        if tag := roles[layer][head].tag:
            by_tag.setdefault(tag, []).append(f"{layer}.{head}")
    found = "; ".join(f"{tag} {' '.join(heads)}" for tag, heads in sorted(by_tag.items()))
    return found or "no head has one"


def lines_below(step: TraceStep, layout: TraceLayout, names: Sequence[str] = ()) -> list[Line]:
    """Return the lines below a token: its candidates, logit lens and effects, if any."""
    lines = candidate_lines(step.candidates, layout)
    if step.lens is not None:
        lines += lens_lines(step.lens, layout)
    if step.effects:
        lines += effect_lines(step, layout, names)
    return lines


def candidate_lines(candidates: Sequence[Candidate], layout: TraceLayout) -> list[Line]:
    """Return the most probable tokens, in columns below the generated token."""
    width = layout.token_width + SHARE_WIDTH + 2
    per_line = max(1, (layout.width - layout.left_width) // width)
    lines: list[Line] = []
    for first in range(0, len(candidates), per_line):
        label = "" if first else "candidates"
        lines.append([(fit(label.rjust(layout.left_width), layout.left_width), "dim")])
        for one in candidates[first : first + per_line]:
            token = fit(encodable(token_name(one.data), layout.encoding), layout.token_width)
            p = shown_probability(one.log_probability)
            lines[-1].append((f" {token} {percent(p)}", heat(p)))
    return lines


def lens_lines(lens: Lens, layout: TraceLayout) -> list[Line]:
    """Return a bar for the token's probability after each layer, and a summary in words."""
    room = max(layout.width - layout.left_width - 1, 1)
    last = lens.top[-1][0]
    summary = f" first choice from layer {lens.layer} on"
    if lens.layer is None:
        p = shown_probability(last.log_probability)
        name = encodable(token_name(last.data), layout.encoding)
        summary = f" not the first choice, which is {name} ({percent(p).strip()})"
    lines: list[Line] = []
    for first in range(0, len(lens.top), room):
        label = "" if first else "lens"
        lines.append([(fit(label.rjust(layout.left_width), layout.left_width) + " ", "dim")])
        for p in map(shown_probability, lens.log_probabilities[first : first + room]):
            lines[-1].append((upright_bar(p) if p >= 1 / 16 else "▁", heat(p)))
    used = layout.left_width + 1 + (len(lens.top) - 1) % room + 1
    if used + cell_len(summary) <= layout.width:
        lines[-1].append((summary, "dim"))
        return lines
    return lines + wrapped(summary.strip(), layout.width, label=" " * (layout.left_width + 1))


def effect_lines(step: TraceStep, layout: TraceLayout, names: Sequence[str] = ()) -> list[Line]:
    """Return the change of ln p without each source, and without its control.

    The last line ends with the change if only the sources and the sink are kept. If every position
    was knocked out, one line shows the largest changes. Args: names, as for ``TraceLayout.step``.
    """
    if step.changes_S is not None:
        return [_largest_effects(step.effects, layout, names)]
    effects = step.effects
    controls = {effect.control_of: effect for effect in effects if effect.control_of is not None}
    sources = [effect for effect in effects if effect.control_of is None]
    # Aligned with the columns of the sources if these are wide enough.
    cell_width = max(layout.source_width, layout.position_width + 2 * SIGNED_WIDTH + 4)
    versus = " vs " if cell_width >= layout.position_width + 2 * SIGNED_WIDTH + 6 else "  "
    per_line = max(1, (layout.width - layout.left_width) // cell_width)
    room = cell_width - layout.position_width - 7  # after the position and the change
    no_control = " no control" if room >= len(" no control") else ""
    lines: list[Line] = []
    for start in range(0, len(sources), per_line):
        line: Line = [(" " * layout.left_width, "plain")]
        if start == 0:
            line = [(_WITHOUT.rjust(layout.left_width), "dim")]
        for i, effect in enumerate(sources[start : start + per_line], start):
            control = f"{versus}{signed(controls[i].change)}" if i in controls else no_control
            line += [
                (f" {effect.source.token.position:>{layout.position_width}} ", "dim"),
                (signed(effect.change), _effect_heat(effect.change)),
                (control.ljust(room), "dim"),
            ]
        line[-1] = (line[-1][0].rstrip(), "dim")
        lines.append(line)
    if step.kept is not None:
        kept: Line = [(f" {signed(step.kept.change)}", _effect_heat(step.kept.change))]
        if lines and _width(lines[-1]) + len(f"  {_ALONE}") + _width(kept) <= layout.width:
            lines[-1] += [(f"  {_ALONE}", "dim"), *kept]
        else:
            lines.append([(_ALONE.rjust(layout.left_width), "dim"), *kept])
    return lines


def _largest_effects(effects: Sequence[Effect], layout: TraceLayout, names: Sequence[str]) -> Line:
    """Return a line with the largest changes, each with the position that was knocked out."""
    line: Line = [(_WITHOUT.rjust(layout.left_width), "dim")]
    for effect in effects:
        cell: Line = [
            (f" {effect.source.token.position:>{layout.position_width}} ", "dim"),
            (fit(layout.name_of(effect.source.token, names), layout.source_token_width), "token"),
            (f" {signed(effect.change)} ", _effect_heat(effect.change)),
        ]
        if len(line) > 1 and _width(line) + _width(cell) - 1 > layout.width:
            break
        line += cell
    line[-1] = (line[-1][0].rstrip(), line[-1][1])
    return line


def _width(line: Line) -> int:
    return sum(cell_len(text) for text, _ in line)


def _effect_heat(change: float) -> str:
    """Return the style of a change of ln p, given by the relative change of p."""
    return heat(1 - math.exp(-abs(change)))


def cause_in_words(check: CauseCheck, measure: Measure = "weight", *, is_all: bool = False) -> str:
    """Describe the result of the knockouts of a trace.

    Args: measure, which ranked the sources; is_all, whether every position in view was knocked
        out, which needs no controls.
    """
    limit = "Weight is not influence." if measure == "weight" else facts_of(measure).caveat
    one = "position" if is_all else "source"
    found = (
        f"{limit} Checked: knocking out a {one} changed ln p by {check.mean_effect:.3f} on average "
        f"({count(check.n_sources, one)})"
    )
    # Trace files of earlier versions have 0 if there were no controls.
    control_effect = check.mean_control_effect if check.n_controls else None
    if control_effect is not None:
        # The numbers as shown; with 5e-4, 0.001 is little more than 0.000.
        times = round(check.mean_effect, 3) / max(round(control_effect, 3), 5e-4)
        how = "more" if times > 2 else "little more" if times > 1 else "no more"
        found += (
            f", a control by {control_effect:.3f} ({count(check.n_controls, 'control')}). The "
            f"sources mattered {how} than their controls."
        )
    else:
        found += "." if is_all else "; there were no controls."
    return f"{found} {_correlation_in_words(check, measure)}"


def _correlation_in_words(check: CauseCheck, measure: Measure) -> str:
    """Describe the rank correlation of a measure and the effects, in a sentence."""
    is_weight = measure == "weight"
    name = "weight" if is_weight else f"measure {measure}"
    correlation = check.rank_correlation
    if correlation is None:
        ranked = "weights" if is_weight else name
        return f"These are too few to rank {ranked} against effects."
    found = f"Rank correlation of {name} and effect: {correlation:.2f}"
    n_pairs = check.n_sources + check.n_controls
    chance = 2 / math.sqrt(n_pairs - 1)  # two standard deviations if there is no correlation
    if abs(correlation) < chance and chance > _WEAK:
        return f"{found}, which may be chance with {n_pairs} knockouts."
    amount = "little" if correlation < _WEAK else "something" if correlation < 0.7 else "much"
    subject = "the weights say" if is_weight else f"{name} says"
    return f"{found}, so here {subject} {amount} about what mattered."
