"""Fields of a published config.json that change no logits, by their names."""

import re

# Parts of the names of what a model computes. Sizes are not among them: a size that is not read
# cannot be wrong, since the shapes of all tensors are checked.
_COMPUTATION = re.compile(
    r"""(?:^|[_.])(?:
    act(?:_|$)|activation|alibi|attend|attention|attn|bidirectional|cap(?!tion)|causal|clamp|clip|
    conv(?!er)|embed|embedding|eps|epsilon|expert|factor|fourier|gate|gelu|global|glu|interpolat|
    kv_shar|layernorm|local|logit|loop|mamba|mask|memory|mix|moe|mrope|multipl|mup|nope|norm|ntk|
    parallel|position|qk|quant|recurren|relu|residual|rmsnorm|rop|rotar|router|scal|shar(?!d)|silu|
    sink|sliding|soft|sparse|sparsity|ssm|swiglu|temperature|theta|window|yarn)""",
    re.VERBOSE | re.IGNORECASE,
)
# Of training, of generation, and of other tasks, although their names are like the above.
_WORDS = """
    attn_implementation clip_grad_norm encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    experts_implementation gradient_checkpointing gradient_clip_norm guidance_scale
    label_smoothing_factor local_dir local_files_only local_rank low_memory mask_token_id
    max_grad_norm mixed_precision num_logits_to_keep
    output_attentions output_hidden_states output_logits output_router_logits temperature
    renormalize_logits router_aux_loss_coef use_flash_attention use_flash_attn
"""
_NO_EFFECT = frozenset(_WORDS.split())


def is_ignored(name: str) -> bool:
    """Return whether a field of config.json that its family does not read changes no logits.

    transformers ignores such fields too. By its name, one may still be read by code of the model's
    own, or by a later version: then it is not ignored.
    """
    return name in _NO_EFFECT or not _COMPUTATION.search(name)
