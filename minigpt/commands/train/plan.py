"""How train --dry-run writes its plan: a table, or JSON."""

from collections.abc import Iterator
from dataclasses import asdict

from rich.text import Text

from minigpt.commands.output import aligned, line_width, show, write_json
from minigpt.config import RunConfig
from minigpt.format import duration, short, with_unit
from minigpt.training.reports.plan import Plan

_POINTERS = 2  # the best checkpoint and the latest are kept besides


def show_plan(plan: Plan, config: RunConfig, *, is_json: bool) -> None:
    """Write a plan to stdout."""
    if is_json:
        facts = asdict(plan)
        facts["memory"]["total"] = plan.memory.total
        write_json(facts | {"n_parameters": sum(plan.parameters.values()), "mfu": plan.mfu})
        return
    rows = [[Text(cell) for cell in row] for row in _rows(plan, config)]
    show(aligned(rows, ["left", "right", "left"], line_width()))


def _rows(plan: Plan, config: RunConfig) -> Iterator[tuple[str, str, str]]:
    model, training = config.model, config.training
    yield "parameters", f"{sum(plan.parameters.values()):,}", model.model_type
    for part, count in plan.parameters.items():
        yield f"  {part}", f"{count:,}", ""
    yield "training tokens", f"{plan.n_train_tokens:,}", config.data.tokenizer
    yield "validation tokens", f"{plan.n_val_tokens:,}", ""
    ranks = f" on each of {plan.n_ranks} processes" if plan.n_ranks > 1 else ""
    shape = f"{training.batch_size} x {config.sequence_length}"
    yield "tokens a step", f"{plan.step_tokens:,}", f"{shape}, in {plan.n_micro_batches}{ranks}"
    is_clock = " or less: the clock ends it" if training.max_minutes else ""
    yield "steps", f"{plan.max_steps:,}", f"{plan.n_steps_left:,} left{is_clock}"
    all_tokens = f"{short(plan.max_steps * plan.step_tokens)} tokens"
    yield "epochs", f"{plan.epochs:.3g}", all_tokens
    yield "arithmetic", with_unit(plan.training_flops, "FLOP"), "forward and backward passes"
    there = with_unit(plan.machine_bytes, "B") if plan.machine_bytes else "an unknown amount"
    note = f"estimate; {plan.device} has {there}"
    yield "memory", with_unit(plan.memory.total, "B"), note
    for part, n_bytes in asdict(plan.memory).items():
        yield f"  {part}", with_unit(n_bytes, "B"), ""
    note = f"at most {training.keep + _POINTERS} are kept"
    yield "a checkpoint", with_unit(plan.checkpoint_bytes, "B"), note
    note = "guess from a few steps; evaluation is extra"
    yield "time", duration(plan.training_s), note
    yield "  a step", f"{1000 * plan.step_s:.3g} ms", "uncompiled" if training.compile else ""
    speed = f"{short(plan.step_tokens / plan.step_s)} tok/s"
    peak = f"{plan.mfu:.0%} of its peak" if plan.mfu is not None else "peak and MFU unknown"
    yield "device", plan.device, f"{plan.dtype}, {speed}, {peak}"
