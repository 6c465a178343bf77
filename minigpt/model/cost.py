"""What a model costs, counted from its config: parameters, FLOPs and cache bytes."""

from minigpt.config import ModelConfig
from minigpt.model.scores import PARAMETERS, score_parameter_count


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights, each counted once."""
    if config.arch != "gpt":
        return _recurrent_parameter_count(config)
    d_query = config.n_head * config.d_head
    d_key = config.n_kv_head * config.d_head
    is_gpt2 = config.family == "gpt2"
    attention = config.d_model * (2 * d_query + 2 * d_key)
    mlp = config.d_model * config.d_mlp * (2 if is_gpt2 else 3)
    norm = config.d_model * (2 if is_gpt2 else 1)
    block = attention + mlp + 2 * norm + score_parameter_count(config)
    has_output_bias = is_gpt2 or config.attention_bias == "all"
    if has_output_bias or config.attention_bias == "qkv":
        block += d_query + 2 * d_key
    block += config.d_model if has_output_bias else 0
    if is_gpt2 or config.mlp_bias:
        block += config.d_model + config.d_mlp * (1 if is_gpt2 else 2)
    if config.qk_norm:
        block += 2 * config.d_head
    embeddings = _embedding_count(config)
    positions = config.context_length * config.d_model if is_gpt2 else 0
    return embeddings + positions + config.n_layer * block + norm


def _embedding_count(config: ModelConfig) -> int:
    return config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)


def _recurrent_parameter_count(config: ModelConfig) -> int:
    width = config.d_model
    gates = 4 * width * (2 * width + 2)  # of input and state, with a bias of each
    attention = 0
    if config.n_attention_layer:
        attention = 2 * width * width + score_parameter_count(config)
    return _embedding_count(config) + config.n_layer * gates + attention + width


def training_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward and backward pass over one token of a full context.

    Six per weight that multiplies (the embeddings only look up), and twelve per layer, head
    dimension and key in view: half the context on average, as the mask is causal. The hidden values
    of a tanh score are a sum and a tanh more each, forward and twice that backward.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    lookups = config.vocab_size * config.d_model * (0 if config.tie_embeddings else 1)
    if config.family == "gpt2":
        lookups += config.context_length * config.d_model
    weights = parameter_count(config) - lookups
    in_view = config.n_attention_layer * config.n_head * config.d_head * config.context_length // 2
    each = 18 if "v" in PARAMETERS.get(config.attention, ()) else 12
    return 6 * weights + each * in_view


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 4) -> int:
    """Return the cache bytes that one position of one sequence takes.

    Of an LSTM, they are the two states of each layer, and are kept so that it can be truncated.
    """
    return 2 * config.n_layer * config.n_kv_head * config.d_head * bytes_per_value
