"""The ways to call attention-trace, and which of its options have an effect in each."""

from dataclasses import fields

from minigpt.commands.attention_trace.targets import LINES
from minigpt.commands.options import NOT_COMPILED, Mode, PromptForm
from minigpt.config import SamplingConfig

_PICTURE_NEEDS = {
    "--picture": ("--svg", "--png"),
    "--position": ("--view text", "--picture strip"),
}
_EXPLAINING = ("logit", "gradient", "integrated")  # measures of the generated token, in logits
_SAMPLING = tuple(  # options of sampled tokens
    f"--{f.name.replace('_', '-')}"
    for f in fields(SamplingConfig)
    if f.name not in ("max_new_tokens", "force")
)
_DRAWN = ("--json", "--out", "--html")

_LIVE = Mode(
    needs={
        **PromptForm.NEEDS,
        **dict.fromkeys(("--knockout", "--verify-layers", "--verify-heads"), ("--n-verified",)),
        "--n-verified": ("--view lines", *_DRAWN),
        "--n-sources": ("--view lines", *_DRAWN),
        "--explain": ("--html", "--out", "--json"),
        "--candidates": ("--view lines", "--view text", *_DRAWN),
        "--lens": ("--view lines", "--view lens", *_DRAWN),
        "--against": tuple(f"--measure {measure}" for measure in _EXPLAINING),
        "--n-steps": ("--measure integrated",),
        "--roles": ("--view lines", "--view heads", *_DRAWN),
        **dict.fromkeys(
            ("--layers", "--heads", "--reduce"),
            ("--view other than heads", "--svg", "--png", *_DRAWN),
        ),
        **_PICTURE_NEEDS,
    },
    refuses={
        "--json": ("--view",),
        **dict.fromkeys((f"--measure {m}" for m in _EXPLAINING), ("--reduce",)),
        "--max-new-tokens 0": _SAMPLING,
        **PromptForm.REFUSES,
        **NOT_COMPILED,
    },
    defaults={"--view": LINES},
)
_REPLAY = Mode(
    "--replay",
    takes=(
        *("--view", "--position", "--n-sources", "--json"),
        *("--html", "--svg", "--png", "--picture"),
        *("--dense", "--layers", "--heads", "--reduce"),
    ),
    why="It shows a file that --out wrote: there is no model and no prompt to continue.",
    needs={
        "--n-sources": ("--view lines",),
        **dict.fromkeys(("--layers", "--heads", "--reduce"), ("--dense",)),
        **_PICTURE_NEEDS,
    },
    refuses={"--json": ("--view", "--n-sources")},
    defaults={"--view": LINES},
)
_DIFF = Mode(
    "--diff",
    takes=("--json",),
    why="It compares two files that --out wrote: there is no model and no prompt to continue.",
)
MODES = (_DIFF, _REPLAY, _LIVE)
