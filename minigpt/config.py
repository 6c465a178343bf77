"""All settings of a model and a run, as frozen dataclasses that validate themselves.

Creating a config validates it: a bad value raises ConfigError. Defaults that are documented as
derived are filled in at the same time, so that a saved config is complete.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from minigpt import model_config
from minigpt.fields import check_fields, option, require, require_divides
from minigpt.rings import find_ring
from minigpt.run_config import DataConfig as DataConfig
from minigpt.run_config import TrainingConfig as TrainingConfig

if TYPE_CHECKING:
    from minigpt.hf_config import ModelConfig as ModelConfig
else:
    _types = find_ring("hf_config")
    ModelConfig = _types.ModelConfig if _types else model_config.PlainModelConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is sampled from the logits, and when generation stops."""

    max_new_tokens: int = option(256, "[0, inf)")
    """Maximum number of generated tokens."""
    force: str | None = option(None, metavar="TEXT", shown="none", has_escapes=True)
    r"""Text that the continuation begins with (\n for a line break). Its tokens count as generated;
    sampling continues after them."""
    temperature: float = option(0.8, "[0, inf)")
    """Divisor of the logits; 0 for greedy decoding."""
    top_k: int = option(0, "[0, inf)")
    """Number of most probable tokens to sample from; 0 for all."""
    top_p: float = option(1.0, "(0, 1]")
    """Nucleus sampling: cumulative probability to sample from, in (0, 1]."""
    min_p: float = option(0.0, "[0, 1]")
    """Minimum probability relative to the most probable token, in [0, 1]."""
    repetition_penalty: float = option(1.0, "(0, inf)")
    """Penalty for tokens in the prompt or the output; 1 for none. Positive logits are divided by
    it, negative ones multiplied (Keskar et al. 2019)."""
    presence_penalty: float = option(0.0, "(-1e30, 1e30)")
    """Amount subtracted once from the logits of generated tokens (OpenAI)."""
    frequency_penalty: float = option(0.0, "(-1e30, 1e30)")
    """Amount subtracted from a token's logit each time it was generated (OpenAI)."""
    ignore_eos: bool = option(False)
    """Never sample the end-of-text token."""
    seed: int | None = option(None, "[0, 2**63)", shown="random, printed")
    """Seed of the sampling RNG. Sample i uses seed + i; None for a random seed."""
    stop: tuple[str, ...] = option((), metavar="TEXT", has_escapes=True)
    r"""Stop string (\n for a line break); repeat for several. The output does not contain it."""
    num_samples: int = option(1, "[1, 2**16]")
    """Number of samples; sample i has seed SEED + i."""
    logprobs: int = option(0, "[0, inf)", group="Output")
    """Number of most probable tokens to report at each step."""
    overflow: Literal["stop", "slide"] = option("stop")
    """Action when the context window is full. See generation/sliding.py."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(all(self.stop), "stop must not be the empty string.")
        require(self.force != "", "force must not be the empty string.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one training run, as saved in config.toml in its folder."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    preset: str = "nano"
    """Preset that the run started from. Empty if it started from a model."""
    from_: str | None = option(None, group="Run", metavar="MODEL")
    """Model to fine-tune: a folder, a run, or org/name on the Hub."""
    command: str = ""
    """Command that started the run, for the model card. Empty if it was started from Python."""

    def __post_init__(self) -> None:
        full = self.model.context_length
        require(
            self.training.sequence_length <= full,
            f"training.sequence_length (--context-length with --from) is "
            f"{self.training.sequence_length}, and the model sees {full} tokens. Use at most that.",
        )
        if short := self.training.context_warmup_length:
            name, full = "training.context_warmup_length", self.sequence_length
            of = "model.context_length, or the sequence_length if there is one"
            require_divides(name, short, of, full, " Use 0 for none.")

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence after context warm-up."""
        return self.training.sequence_length or self.model.context_length

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, across all ranks."""
        return self.training.batch_size * self.sequence_length
