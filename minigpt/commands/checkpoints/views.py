"""Lines of text about checkpoints: the list of a folder, and the facts of one model."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigpt.commands import tables
from minigpt.format import count, with_unit
from minigpt.text.escape import one_line

if TYPE_CHECKING:  # these import torch, which a list does not need
    from minigpt.checkpoint.stored_tensors import StoredTensor
    from minigpt.checkpoint.tools.inspection import Check, ModelFacts
    from minigpt.checkpoint.tools.inventory import Checkpoint, Entry

_UNKNOWN = "-"
_INDENT = "  "
_LAYER = re.compile(r"(?P<layers>\D*)\.(?P<number>\d+)\.(?P<rest>.*)")


def inventory_lines(entries: Sequence["Entry"], width: int | None) -> Iterator[Text]:
    """Yield a table of all checkpoints, grouped by run or model."""
    head = ["step", "nats/token", "bits/byte", "size", "written", ""]
    rows = [[Text(word, "dim") for word in head]]
    rows += [_row(checkpoint) for entry in entries for checkpoint in entry.checkpoints]
    room = None if width is None else width - len(_INDENT)
    shown = tables.fitting(rows, room, ("written", "bits/byte", "size"))
    sides = ["left" if title.plain in ("written", "") else "right" for title in shown[0]]
    lines = tables.aligned(shown, sides, room)
    yield Text(_INDENT) + next(lines)
    for entry in entries:
        layouts = [checkpoint.layout for checkpoint in entry.checkpoints if checkpoint.layout]
        yield Text()
        yield Text.assemble(
            (one_line(entry.name), "bold"), _INDENT, (one_line("".join(layouts[:1])), "dim")
        )
        yield from (Text(_INDENT) + next(lines) for _ in entry.checkpoints)


def _row(checkpoint: "Checkpoint") -> list[Text]:
    losses = (checkpoint.val_loss, checkpoint.bits_per_byte)
    marks = {"best": checkpoint.is_best, "latest": checkpoint.is_latest}
    state = ", ".join(mark for mark, is_set in marks.items() if is_set)
    return [
        Text(_UNKNOWN if checkpoint.step is None else str(checkpoint.step)),
        *(Text(_UNKNOWN if loss is None else f"{loss:.4f}") for loss in losses),
        Text(with_unit(checkpoint.n_bytes, "B")),
        Text(f"{checkpoint.written_at.astimezone():%Y-%m-%d %H:%M}"),
        Text("damaged", "red") if checkpoint.damage else Text(state, "green"),
    ]


def check_line(check: "Check") -> Text:
    """Return the line that reports a check."""
    word, style = ("bad", "red") if check.problem else ("ok ", "green")
    good = {True: "as written, by SHA-256", False: "no manifest; names and shapes fit config.json"}
    text = check.problem or good[check.has_manifest]
    return Text.assemble(
        (word, style), _INDENT, one_line(str(check.folder)), _INDENT, one_line(text)
    )


def removal_lines(word: str, checkpoints: Iterable["Checkpoint"]) -> Iterator[Text]:
    """Yield a line for each removed checkpoint."""
    for checkpoint in checkpoints:
        size = with_unit(checkpoint.n_bytes, "B")
        yield Text(f"{word} {one_line(str(checkpoint.folder))}, {size}")


def total(checkpoints: Sequence["Checkpoint"]) -> str:
    """Return the number of checkpoints and their total size."""
    n_bytes = sum(checkpoint.n_bytes for checkpoint in checkpoints)
    return f"{count(len(checkpoints), 'checkpoint')}, {with_unit(n_bytes, 'B')}"


def model_lines(facts: "ModelFacts", width: int | None) -> Iterator[Text]:
    """Yield the facts of a model and a table of its tensors, identical blocks as one."""
    yield Text(one_line(str(facts.folder)), "bold")
    yield from tables.fact_lines(_facts(facts))
    yield Text()
    head = [Text(word, "dim") for word in ("tensor", "dtype", "shape", "bytes")]
    rows = [head, *_tensor_rows(facts.tensors)]
    yield from tables.aligned(rows, ["left", "left", "left", "right"], width)


def model_record(facts: "ModelFacts") -> dict[str, Any]:
    """Return the facts of a model, for JSON."""
    tensors = [
        {name: getattr(tensor, name) for name in ("name", "dtype", "shape", "n_bytes")}
        | {"file": tensor.path.name}
        for tensor in facts.tensors
    ]
    return asdict(facts) | {"tensors": tensors}


def _facts(facts: "ModelFacts") -> dict[str, str]:
    config = facts.config
    dtypes = ", ".join(dict.fromkeys(tensor.dtype for tensor in facts.tensors))
    heads = f"{count(config.n_head, 'head')} of {config.d_head}"
    if config.n_kv_head < config.n_head:
        heads += f", {count(config.n_kv_head, 'key/value head')}"
    output = "tied to the embedding" if config.tie_embeddings else "not tied"
    norm = ", QK-norm" if config.qk_norm else ""
    biases = {"none": "", "qkv": ", biases of queries, keys, values", "all": ", biases"}[
        "all" if config.family == "gpt2" else config.attention_bias
    ]
    positions = "learned"
    if config.family != "gpt2":
        positions = f"rotary, theta {config.rope_theta:,.0f}"
        # Without the ring of families, a config has neither this field nor the one below.
        if (factor := getattr(config, "rope_scaling_factor", 1)) != 1:
            is_dynamic = config.rope_scaling == "dynamic"
            how = "only beyond the context" if is_dynamic else f"{factor:g} times"
            positions += f", stretched {how} ({config.rope_scaling})"
    mlp = "gated" if any(".gate" in tensor.name for tensor in facts.tensors) else "two layers"
    cache_bytes = facts.float32_cache_bytes_per_token
    shown = {
        "layout": config.model_type,
        "parameters": f"{facts.n_parameters:,}, stored in {with_unit(facts.n_bytes, 'B')} "
        f"({dtypes})",
        "blocks": f"{config.n_layer}, {config.d_model} wide",
        "attention": f"{config.attention}, {heads}{norm}{biases}",
        "MLP": f"{mlp}, {config.d_mlp} wide, {config.activation}",
        "positions": positions,
        "vocabulary": f"{config.vocab_size:,} tokens; output projection {output}",
        "context": f"{config.context_length:,} tokens",
        "compute": f"{with_unit(facts.forward_flops_per_token, 'FLOPs')}/token forward, "
        f"{with_unit(facts.training_flops_per_token, 'FLOPs')}/token training",
        "KV cache": f"{with_unit(cache_bytes, 'B')}/token, "
        f"{with_unit(cache_bytes * config.context_length, 'B')} for a full context (float32; "
        "bfloat16: half)",
    }
    if fields := getattr(config, "hf_fields", ()):  # computed only by the family's own class
        own = (field if len(field) < 40 else f"{field[:36]}..." for field in fields)
        shown["its fields"] = one_line(", ".join(own))
    if config.arch != "gpt":
        shown["layout"] = f"{config.model_type}, {config.arch}"
        shown["attention"] = config.attention
        for name in ("MLP", "positions"):
            del shown[name]
        shown["states"] = shown.pop("KV cache")
    return shown


def _tensor_rows(tensors: Iterable["StoredTensor"]) -> Iterator[list[Text]]:
    """Yield the rows of each tensor, and of identical blocks only once."""
    # Name of a tensor, or of a stack of blocks -> number of the block -> its tensors.
    found: dict[str, dict[str, list[tuple[str, StoredTensor]]]] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        name, number, rest = match.groups() if match else (tensor.name, "", "")
        found.setdefault(name, {}).setdefault(number, []).append((rest, tensor))
    for name, blocks in found.items():
        if "" in blocks:
            yield _tensor_row(name, blocks[""][0][1])
        else:
            yield from _block_rows(name, blocks)


def _block_rows(
    layers: str, blocks: dict[str, list[tuple[str, "StoredTensor"]]]
) -> Iterator[list[Text]]:
    identical: dict[Any, list[int]] = {}
    for number, block in blocks.items():
        shape = tuple((rest, tensor.dtype, tensor.shape) for rest, tensor in block)
        identical.setdefault(shape, []).append(int(number))
    for numbers in identical.values():
        block = blocks[str(numbers[0])]
        modules = list(dict.fromkeys(rest.split(".")[0] for rest, _ in block))
        block = sorted(block, key=lambda item: modules.index(item[0].split(".")[0]))
        n_bytes = sum(tensor.n_bytes for _, tensor in block)
        total = f"{len(numbers)} x {with_unit(n_bytes, 'B')}"
        yield [Text(f"{one_line(layers)}.{_ranges(numbers)}"), Text(), Text(), Text(total)]
        yield from (_tensor_row(f"{_INDENT}{rest}", tensor) for rest, tensor in block)


def _tensor_row(name: str, tensor: "StoredTensor") -> list[Text]:
    return [
        Text(one_line(name)),
        Text(tensor.dtype),
        Text(" x ".join(map(str, tensor.shape))),
        Text(with_unit(tensor.n_bytes, "B")),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: 0-11, or 0-2,5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)
