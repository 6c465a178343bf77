"""minigpt train --dry-run: print the plan of a run as a table or as JSON."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from rich.text import Text

from minigpt.commands.tables import aligned, line_width, show, write_json
from minigpt.commands.train.explanations import slow_dtype_note
from minigpt.commands.train.job import Request, open_job
from minigpt.commands.train.run import joined, make_display
from minigpt.config import RunConfig
from minigpt.format import duration, short, with_unit
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.training.reports.plan import make_plan
from minigpt.training.state import read_state

_POINTERS = 2  # the best and the latest checkpoint are kept as well


def plan_training(
    name: str | None, overrides: dict[str, Any], *, resume: bool, is_json: bool
) -> None:
    """Print the plan of the run that ``run_training`` would train; write nothing."""
    with joined() as world:
        with make_display() as display:
            request = Request(name, overrides, world.size, display.preparing, nullcontext)
            with open_job(request, resume=resume) as job:
                done = read_state(job.resume_from) if job.resume_from else None
                device = resolve_device(job.config.training.device)
                dtype = resolve_dtype(job.config.training.dtype, device)
                notes = *job.notes, *job.data.manifest.notes(), slow_dtype_note(device, dtype)
                for line in filter(None, notes):
                    display.note(line)
                base_dtype = job.carried.dtype if job.carried else "float32"
                plan = make_plan(job.config, job.data, world, done, base_dtype)
        if is_json:
            write_json(plan)
        else:
            # With the actual vocabulary size of bpe, as the run names it.
            data = replace(job.config.data, tokenizer=job.data.manifest.tokenizer)
            lines = _rows(plan, replace(job.config, data=data))
            rows = [[Text(cell) for cell in line] for line in lines]
            show(aligned(rows, ["left", "right", "left"], line_width()))


def _rows(plan: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, str, str]]:
    model, training = config.model, config.training
    yield "parameters", f"{plan['n_parameters']:,}", model.kind
    for part, count in plan["parameters"].items():
        yield f"  {part}", f"{count:,}", ""
    yield "training tokens", f"{plan['n_train_tokens']:,}", config.data.tokenizer
    yield "validation tokens", f"{plan['n_val_tokens']:,}", ""
    ranks = f" on each of {plan['n_ranks']} processes" if plan["n_ranks"] > 1 else ""
    shape = f"{training.batch_size} x {config.sequence_length}"
    n_micro = plan["n_micro_batches"]
    shape += f", in {n_micro} micro-batch{'es' if n_micro > 1 else ''}{ranks}"
    yield "tokens per step", f"{plan['step_tokens']:,}", shape
    time_limit = ", fewer if time runs out" if training.max_minutes else ""
    yield "steps", f"{plan['max_steps']:,}", f"{plan['n_steps_left']:,} left{time_limit}"
    n_tokens = plan["max_steps"] * plan["step_tokens"]
    yield "epochs", f"{plan['epochs']:.3g}", f"{short(n_tokens)} tokens"
    yield "compute", with_unit(plan["training_flops"], "FLOP"), "forward and backward passes"
    machine_bytes = plan["machine_bytes"]
    available = with_unit(machine_bytes, "B") if machine_bytes else "an unknown amount"
    note = f"estimate; {plan['device']} has {available}"
    yield "memory", with_unit(plan["memory"]["total"], "B"), note
    for part, n_bytes in plan["memory"].items():
        if part != "total":
            yield f"  {part}", with_unit(n_bytes, "B"), ""
    note = f"at most {training.keep + _POINTERS} are kept"
    yield "checkpoint", with_unit(plan["checkpoint_bytes"], "B"), note
    note = "estimated from a few steps, without evaluation"
    yield "time", duration(plan["training_s"]), note
    step_s = plan["step_s"]
    step_time = f"{1000 * step_s:.3g} ms" if step_s < 0.9995 else f"{step_s:,.4g} s"
    by_default = " (--no-compile)" if training.compile is None else ""
    note = f"uncompiled, unlike the run{by_default}" if plan["is_compiled"] else ""
    yield "  per step", step_time, note
    speed = f"{short(plan['step_tokens'] / plan['step_s'])} tok/s"
    peak = f"{plan['mfu']:.0%} of its peak" if plan["mfu"] is not None else "peak and MFU unknown"
    yield "device", plan["device"], f"{plan['dtype']}, {speed}, {peak}"
