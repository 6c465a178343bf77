"""Facts about a trace as a whole, for the page."""

from dataclasses import asdict

from minigpt.config import SamplingConfig
from minigpt.format import count
from minigpt.text.escape import token_name
from minigpt.tracing.analysis_config import KNOCKOUTS, facts_of
from minigpt.tracing.findings import CONVENTION, Trace, TraceHeader
from minigpt.tracing.summary import measured

_REDUCTIONS = {
    "mean": "at each position, the mean of the heads",
    "max": "at each position, the largest of the heads: a row of weights does not sum to 1",
    "rollout": "attention multiplied through the layers (Abnar & Zuidema 2020)",
}


def facts_about(trace: Trace) -> list[tuple[str, str]]:
    """Return the facts of a trace as names and values."""
    header = trace.header
    size = f"{count(header.n_layer, 'layer')} x {count(header.n_head, 'head')}"
    if header.n_kv_head != header.n_head:
        size += f" ({count(header.n_kv_head, 'key/value head')})"
    size += f", {header.d_model} wide"
    usual = asdict(SamplingConfig(seed=header.sampling.seed))
    sampling = ", ".join(
        f"{name} {value}"
        for name, value in asdict(header.sampling).items()
        if name == "temperature" or value != usual[name]
    )
    facts = [
        ("model", header.model),
        ("size", size),
        ("rows", measured(header)),
        *((measure, facts_of(measure).description) for measure in header.measures),
        *_reduction(header),
        ("sink", f"position {header.sink}, {header.sink_rule}"),
        ("tokens", f"{len(header.prompt)} of the prompt, {trace.footer.n_tokens} generated"),
        ("seed", str(header.seed)),
        ("sampling", sampling),
        ("dtype", header.dtype),
        ("kernel", header.kernel),
        ("convention", CONVENTION),
    ]
    if header.against is not None:
        facts.append(("against", f"minus the logit of {token_name(header.against.data)}"))
    if header.n_verified:
        which = "every position"
        if header.n_verified != "all":
            which = f"{count(header.n_verified, 'source')} per token, and a control for each"
        facts.append(("knockouts", f"{which}: {knocked_out(header)}"))
    if header.intervention is not None:
        facts.append(("changed", str(header.intervention)))
    return facts if header.model_sha256 is None else [*facts, ("sha256", header.model_sha256)]


def _reduction(header: TraceHeader) -> list[tuple[str, str]]:
    """Return the reduction over heads as a fact; none for a measure without heads."""
    facts = facts_of(header.measures[0])
    if not facts.has_heads:
        return []
    if facts.is_signed:
        return [("sum", "at each position, the sum of the heads")]
    return [(header.reduce, _REDUCTIONS[header.reduce])]


def knocked_out(header: TraceHeader) -> str:
    """Describe the effect of a knockout, and the heads it applies to."""
    heads = header.verified_heads
    return KNOCKOUTS[header.knockout] + ("" if heads is None else f" in {heads.as_text()}")
