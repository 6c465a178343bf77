"""Apply the interventions that a command's options ask for to a loaded model."""

from dataclasses import replace

from minigpt.commands.loading import PromptedModel
from minigpt.commands.options import PromptForm
from minigpt.generation.loading import encode_prompt
from minigpt.intervention_config import InterventionConfig
from minigpt.tracing.interventions import intervene


def with_interventions(
    prompted: PromptedModel, interventions: InterventionConfig, form: PromptForm
) -> PromptedModel:
    """Return the model with interventions applied; see tracing/interventions.py."""

    def encode(text: str) -> list[int]:
        if prompted.chat is None:
            return encode_prompt(prompted.tokenizer, text, special=form.special)
        return prompted.chat.ask(text)[0]

    model, intervention = intervene(prompted.model, interventions, prompted.prompt, encode)
    return replace(prompted, model=model, intervention=intervention)
