"""What a trace is of, and what its checks found, in plain words."""

from collections.abc import Sequence

from minigpt.tracing.config import Measure
from minigpt.tracing.events import CauseCheck, Roles, TraceHeader
from minigpt.tracing.selection import HeadSelection

SCORES = ("previous", "duplicate", "induction", "sink", "local")
"""The scores of a head's roles, as the fields of ``Roles`` are named."""
KNOCKED_OUT = {
    "key": "its key is hidden from that query, and the other weights grow to sum to 1 again",
    "value": "its value is made 0 for that query, and its weight stays and brings nothing",
}
"""What becomes of a source that is knocked out."""


def measured(header: TraceHeader, measures: Sequence[Measure] | None = None) -> str:
    """Return what the rows are, in words: ``weight, mean of all 8 heads (2 layers x 4)``."""
    names = " and ".join(header.measures if measures is None else measures)
    selection = header.selection
    how = "rollout of the mean" if header.reduce == "rollout" else header.reduce
    if selection.n_chosen == 1 and header.reduce != "rollout":
        return f"{names} of head {selection.as_text()}"
    if selection.is_all:
        layers = f"{header.n_layer} layer{'s' if header.n_layer > 1 else ''}"
        return f"{names}, {how} of all {selection.n_chosen} heads ({layers} x {header.n_head})"
    return f"{names}, {how} of {selection.n_chosen} heads ({selection.as_text()})"


def roles_in_words(roles: tuple[tuple[Roles, ...], ...], selection: HeadSelection) -> str:
    """Return the scores of one head, or of several which have which role."""
    chosen = [(i, head) for i, heads in enumerate(selection.heads_by_layer) for head in heads]
    if len(chosen) == 1:
        role = roles[chosen[0][0]][chosen[0][1]]
        scores = ", ".join(f"{name} {getattr(role, name):.0%}" for name in SCORES)
        return f"{role.tag or 'none'}: {scores}"
    by_tag: dict[str, list[str]] = {}
    for layer, head in chosen:
        if tag := roles[layer][head].tag:
            by_tag.setdefault(tag, []).append(f"{layer}.{head}")
    found = "; ".join(f"{tag} {' '.join(heads)}" for tag, heads in sorted(by_tag.items()))
    return found or "no head has one"


def knockout_in_words(header: TraceHeader) -> str:
    """Return what is knocked out, and where its effect stands."""
    return (
        f"the {header.n_verified} strongest sources of each token, and a position near each that "
        f"had less, are knocked out ({KNOCKED_OUT[header.knockout]}); below a token, the change "
        "of ln p without a source vs without its control"
    )


def cause_in_words(check: CauseCheck) -> str:
    """Return what knocking out the sources has shown, in plain words."""
    sources, controls = _without(check.n_sources, "source"), _without(check.n_controls, "control")
    by_control = f"{controls} by {check.mean_control_effect:.3f}"
    found = (
        f"Weight is not influence. Checked: {sources} ln p changed by {check.mean_effect:.3f} on "
        f"average, {by_control if check.n_controls else 'no controls'}."
    )
    if check.n_controls:
        is_more = check.mean_effect > 2 * check.mean_control_effect
        found += (
            " What was attended to mattered more than what stood near it."
            if is_more
            else " What was attended to hardly mattered more than what stood near it."
        )
    correlation = check.rank_correlation
    if correlation is None:
        return f"{found} That is too little to rank weights against effects."
    told = "little" if correlation < 0.3 else "something" if correlation < 0.7 else "much"
    return (
        f"{found} Rank correlation of weight and effect: {correlation:.2f}, so here the weights "
        f"say {told} about what mattered."
    )


def _without(n: int, what: str) -> str:
    return f"without the one {what}" if n == 1 else f"without any of {n} {what}s"
