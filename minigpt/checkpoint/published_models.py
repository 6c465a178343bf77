"""Published models: fields of their config.json without effect, and new models of their types."""

from dataclasses import fields

from minigpt.checkpoint.families import (
    family_of,
    hf_fields,
    model_config_from_hf,
    model_config_to_hf,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError

# Of training, of generation, and of other tasks.
_WORDS = """
    assistant_confidence_threshold attn_implementation auto_map bad_words_ids
    begin_suppress_tokens cache_implementation chunk_size_feed_forward classifier_dropout
    cls_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    experts_implementation exponential_decay_length_penalty finetuning_task force_words_ids
    forced_bos_token_id forced_eos_token_id gradient_checkpointing guidance_scale id2label
    is_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty license
    low_memory mask_token_id max_length max_new_tokens max_sequence_length max_time min_length
    min_new_tokens min_p model_max_length name_or_path neftune_noise_alpha no_repeat_ngram_size
    num_assistant_tokens num_beam_groups num_beams num_labels num_logits_to_keep
    num_return_sequences output_attentions output_hidden_states output_logits output_past
    output_router_logits output_scores penalty_alpha prefix problem_type
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict return_dict_in_generate sep_token_id sequence_bias stop_strings suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torchscript transformers.js_config typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_return_dict vocab_file watermarking_config
"""
NO_EFFECT = frozenset(_WORDS.split())
"""Fields of config.json that change no logits."""


def canonical(config: ModelConfig) -> ModelConfig:
    """Return the config of a new model as it will be read from its config.json.

    Raises: ConfigError for a field that the model type does not have, so that the model could not
        be read again.
    """
    kind = config.model_type
    if config.activation not in family_of(kind).activations.values():
        raise ConfigError(
            f"a model of type {kind} cannot have the activation {config.activation!r}. Choose "
            f"{', '.join(sorted(set(family_of(kind).activations.values())))}."
        )
    try:
        again = model_config_from_hf(model_config_to_hf(config, None))
    except CheckpointError as error:
        raise ConfigError(f"a model of type {kind} cannot be like this: {error}") from None
    for f in fields(ModelConfig):
        asked, has = getattr(config, f.name), getattr(again, f.name)
        if f.name != "hf_fields" and asked != has:
            raise ConfigError(
                f"a model of type {kind} always has {f.name} {has!r}: it is {asked!r}. Set "
                f"model.{f.name} to that."
            )
    if lost := sorted(hf_fields(config).keys() - hf_fields(again).keys()):
        raise ConfigError(
            f"{lost[0]} changes nothing in a model of type {kind} like this. Leave it out of "
            "model.hf_fields."
        )
    return again
