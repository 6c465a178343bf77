"""Apply the interventions that a command's options ask for to a loaded model."""

from dataclasses import replace

from minigpt.commands.loading import Ready
from minigpt.commands.options import PromptForm
from minigpt.generation.loading import encode_prompt
from minigpt.intervention_config import InterventionConfig
from minigpt.tracing.interventions import intervene


def with_interventions(ready: Ready, interventions: InterventionConfig, form: PromptForm) -> Ready:
    """Return ``ready`` with interventions applied to its model; see tracing/interventions.py."""

    def encode(text: str) -> list[int]:
        if ready.chat is None:
            return encode_prompt(ready.tokenizer, text, special=form.special)
        return ready.chat.ask(text)[0]

    model, intervention = intervene(ready.model, interventions, ready.prompt, encode)
    return replace(ready, model=model, intervention=intervention)
