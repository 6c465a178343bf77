"""Batches from one prefill, sliding windows and growing prompts, each compared with a single row
or a plain loop."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_config, small_model

from minigpt.config import SamplingConfig
from minigpt.errors import DataError
from minigpt.generation.conversation import Conversation
from minigpt.generation.decoder import Decoder, Step
from minigpt.generation.samples import max_rows_together
from minigpt.generation.sampling import Sampler
from minigpt.generation.sliding import SlidingDecoder
from minigpt.model.cache import cache_bytes_per_token
from minigpt.model.gpt import GPT

PROMPT = random_tokens(5).tolist()
ALL: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}


def alone(model: GPT, seed: int, end_of_text: Sequence[int] = (), **options: Any) -> list[Step]:
    config = SamplingConfig(**options)
    decoder = Decoder(model, PROMPT, max_new_tokens=config.max_new_tokens)
    return list(decoder.generate(config, seed=seed, end_of_text=end_of_text))


def together(
    model: GPT,
    seeds: Sequence[int],
    end_of_text: Sequence[int] = (),
    stops: Sequence[tuple[int, int]] = (),
    **options: Any,
) -> list[list[Step]]:
    """Decode rows together; ``stops`` lists (row, step index) after which a row is stopped."""
    config = SamplingConfig(**options)
    decoder = Decoder(model, PROMPT, max_new_tokens=config.max_new_tokens, n_rows=len(seeds))
    rows: list[list[Step]] = [[] for _ in seeds]
    stopped: set[int] = set()
    for row, step in decoder.batch(config, seeds=seeds, end_of_text=end_of_text, stopped=stopped):
        rows[row].append(step)
        if (row, step.index) in stops:
            stopped.add(row)
    return rows


def step_facts(steps: Sequence[Step]) -> list[tuple[Any, ...]]:
    return [(s.index, s.position, s.token, s.finish, s.n_slides, s.n_forgotten) for s in steps]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"temperature": 1.0}, ALL], ids=["plain", "all"])
def test_each_row_of_a_batch_equals_a_single_row_with_the_same_seed(
    layout: str, options: dict[str, Any]
) -> None:
    model = small_model(layout)
    rows = together(model, [4, 5, 6, 7], max_new_tokens=12, **options)
    for seed, row in zip([4, 5, 6, 7], rows, strict=True):
        expected = alone(model, seed, max_new_tokens=12, **options)
        assert step_facts(row) == step_facts(expected)
        # Matrix products of another shape sum in another order.
        assert [s.log_probability for s in row] == pytest.approx(
            [s.log_probability for s in expected], abs=1e-4
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finished_rows_do_not_change_the_others(layout: str) -> None:
    """Rows finish at an end of text, each at another step, or because they are stopped."""
    model, seeds = small_model(layout), list(range(8))
    free = together(model, seeds, max_new_tokens=15, temperature=1.2)
    ends = [free[2][3].token, free[5][9].token]
    ended = together(model, seeds, ends, [(0, 4), (6, 0)], max_new_tokens=15, temperature=1.2)
    for seed, whole, row in zip(seeds, free, ended, strict=True):
        tokens = [step.token for step in whole]
        n = min([tokens.index(end) + 1 for end in ends if end in tokens] + [15])
        n = min(n, {0: 5, 6: 1}.get(seed, 15))
        assert [step.token for step in row] == tokens[:n]
        is_end = tokens[n - 1] in ends
        assert row[-1].finish == ("end_of_text" if is_end else "length" if n == 15 else None)
    assert len({len(row) for row in ended}) >= 4, "rows must end at different steps"


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    model = small_model()
    for others in ([1, 2, 3], [9, 9, 9], [100, 200, 300]):
        rows = together(model, [others[0], 5, *others[1:]], max_new_tokens=12, **ALL)
        assert step_facts(rows[1]) == step_facts(alone(model, 5, max_new_tokens=12, **ALL))


def test_a_decoder_generates_one_row_or_several_in_any_order() -> None:
    model, options = small_model(), {"max_new_tokens": 9, "temperature": 1.0}
    config = SamplingConfig(**options)
    decoder = Decoder(model, PROMPT, max_new_tokens=9, n_rows=4)
    expected = {seed: step_facts(alone(model, seed, **options)) for seed in range(4)}
    for seeds in ([0], [1, 2, 3, 0], [2], [3, 1]):
        rows: list[list[Step]] = [[] for _ in seeds]
        stopped: set[int] = set()
        for row, step in decoder.batch(config, seeds=seeds, stopped=stopped):
            rows[row].append(step)
            if len(seeds) == 4 and step.index == row:
                stopped.add(row)
        for seed, row_steps in zip(seeds, rows, strict=True):
            assert step_facts(row_steps) == expected[seed][: len(row_steps)]


def test_max_rows_together_fit_into_a_gibibyte() -> None:
    config = small_config(context_length=1000)
    per_row = 1000 * cache_bytes_per_token(config)
    assert max_rows_together(config, 10, 50) == 10
    assert max_rows_together(config, 10**6, 50) == 256
    huge = small_config(context_length=2_000_000)
    assert per_row * 2000 * 2 > 2**30
    assert max_rows_together(huge, 10, 10**9) == 1
    n = max_rows_together(small_config(context_length=50_000), 256, 10**9)
    assert 1 < n < 256
    assert n * per_row * 50 <= 2**30 < (n + 1) * per_row * 50


def test_logprobs_do_not_depend_on_sampling_options() -> None:
    model = small_model()
    steps = alone(model, 1, max_new_tokens=6, logprobs=4, ignore_eos=True, **ALL)
    context = list(PROMPT)
    for step in steps:
        with torch.no_grad():
            expected = model(torch.tensor([context]))[0, -1].log_softmax(dim=0)
        assert [token for token, _ in step.best] == expected.topk(4).indices.tolist()
        values = [value for _, value in step.best]
        torch.testing.assert_close(torch.tensor(values), expected.topk(4).values)
        context.append(step.token)
    assert alone(model, 1, max_new_tokens=1)[0].best == ()
    assert len(alone(model, 1, max_new_tokens=1, logprobs=1000)[0].best) == 61


def test_an_ignored_end_of_text_is_never_sampled() -> None:
    model = small_model()
    free = alone(model, 1, max_new_tokens=18, temperature=1.0)
    ends = [free[3].token, 10**6]  # a vocabulary may be larger than the model
    steps = alone(model, 1, ends, max_new_tokens=18, temperature=1.0, ignore_eos=True)
    assert steps[-1].finish == "length"
    assert ends[0] not in [step.token for step in steps]


def plain_sliding(
    model: GPT, prompt: Sequence[int], config: SamplingConfig, seed: int
) -> list[tuple[int, int, int, int]]:
    """Generate without a cache: the model reads the whole window for each token."""
    sampler = Sampler(config, seeds=[seed], device="cpu", prompt=prompt)
    n_window = model.config.context_length
    said, view, result, n_slides = list(prompt), list(prompt), [], 0
    for _ in range(config.max_new_tokens):
        if len(view) > n_window:
            view = view[: min(4, n_window // 4)] + view[-max(1, n_window // 2) :]
            n_slides += 1
        with torch.no_grad():
            token = int(sampler.draw(model(torch.tensor([view]))[:, -1]))
        result.append((token, len(said), n_slides, len(said) - len(view)))
        said.append(token)
        view.append(token)
    return result


@pytest.mark.integration
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sliding_window_equals_a_plain_loop(layout: str) -> None:
    model = small_model(layout)
    config = SamplingConfig(max_new_tokens=60, overflow="slide", **ALL)
    decoder = SlidingDecoder(model, PROMPT, n_rows=3)
    for seed in (1, 2):
        steps = list(decoder.generate(config, seed=seed))
        assert [(s.token, s.position, s.n_slides, s.n_forgotten) for s in steps] == plain_sliding(
            model, PROMPT, config, seed
        )
        assert [s.finish for s in steps] == [None] * 59 + ["length"]
    rows: list[list[Step]] = [[], [], []]
    for row, step in decoder.batch(config, seeds=[1, 2, 3]):
        rows[row].append(step)
    for seed, row_steps in zip((1, 2, 3), rows, strict=True):
        assert step_facts(row_steps) == step_facts(list(decoder.generate(config, seed=seed)))


@pytest.mark.parametrize("context_length", [1, 2, 3, 4, 7])
def test_a_tiny_window_slides(context_length: int) -> None:
    model = small_model(context_length=context_length)
    config = SamplingConfig(max_new_tokens=20, overflow="slide", temperature=1.0)
    steps = list(SlidingDecoder(model, [3]).generate(config, seed=1))
    assert [(s.token, s.position, s.n_slides, s.n_forgotten) for s in steps] == plain_sliding(
        model, [3], config, 1
    )


def test_a_window_that_is_not_full_does_not_slide() -> None:
    model = small_model()
    slid = alone(model, 1, max_new_tokens=20, temperature=1.0, overflow="slide")
    assert slid == alone(model, 1, max_new_tokens=20, temperature=1.0)


class FedTokenCounter:
    """Counts the tokens that a decoder feeds."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_tokens, feed = 0, decoder.forward.feed

        def counting(tokens: torch.Tensor) -> torch.Tensor:
            self.n_tokens += tokens.shape[1]
            return feed(tokens)

        monkeypatch.setattr(decoder.forward, "feed", counting)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_seen", [0, 1, 4, 6])
def test_an_extended_prompt_continues_like_the_concatenated_text(
    layout: str, n_seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a complete answer of six tokens, after an abandoned one, and without any answer."""
    model, typed = small_model(layout), [7, 8, 9]
    config = SamplingConfig(max_new_tokens=6, temperature=1.0)
    decoder = Conversation(model, PROMPT)
    steps = decoder.generate(config, seed=1)
    said = [next(steps).token for _ in range(n_seen)]
    fed = FedTokenCounter(decoder, monkeypatch)
    decoder.extend(typed)
    # The last token of an answer was not fed yet, because its logits were not needed.
    assert fed.n_tokens == len(typed) + (n_seen > 0)
    whole = PROMPT + said + typed
    assert decoder.prompt == whole
    assert step_facts(list(decoder.generate(config, seed=2))) == step_facts(
        list(Conversation(model, whole).generate(config, seed=2))
    )


def test_extending_keeps_generated_tokens_but_drops_the_end_of_text() -> None:
    model, config = small_model(), SamplingConfig(max_new_tokens=6, temperature=1.0)
    decoder = Conversation(model, PROMPT)
    free = [step.token for step in decoder.generate(config, seed=1)]
    decoder.extend([])
    assert decoder.prompt == PROMPT + free
    longer = alone(model, 1, max_new_tokens=12, temperature=0.0)
    decoder = Conversation(model, PROMPT)
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    first = [step.token for step in decoder.generate(greedy, seed=1)]
    decoder.extend([])
    second = [step.token for step in decoder.generate(greedy, seed=1)]
    assert first + second == [step.token for step in longer]
    decoder = Conversation(model, PROMPT)
    ended = list(decoder.generate(config, seed=1, end_of_text=[free[3]]))
    assert ended[-1].finish == "end_of_text"
    decoder.extend([7])
    assert decoder.prompt == [*PROMPT, *free[: len(ended) - 1], 7]


def test_a_prompt_too_long_for_the_window_raises_or_slides() -> None:
    model = small_model()  # 24 positions
    decoder = Conversation(model, random_tokens(20).tolist())
    config = SamplingConfig(max_new_tokens=30, temperature=1.0)
    steps = list(decoder.generate(config, seed=1))
    assert steps[-1].finish == "context"
    assert decoder.is_full
    before = decoder.prompt
    with pytest.raises(
        DataError, match=r"^the context window is full: the conversation has 28 tokens, but"
    ):
        decoder.extend([1, 2, 3])
    assert decoder.prompt == before
    decoder.extend([1, 2, 3], overflow="slide")
    said = [*before, *(step.token for step in steps), 1, 2, 3]
    assert decoder.prompt == said[:4] + said[-12:]
    fresh = Conversation(model, decoder.prompt).generate(config, seed=1)
    went_on = list(decoder.generate(config, seed=1))
    assert [step.token for step in went_on] == [step.token for step in fresh]
    assert (went_on[0].position, went_on[0].n_slides, went_on[0].n_forgotten) == (28, 1, 12)
    assert not Conversation(model, before).is_full


@pytest.mark.integration
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_transformers(penalty: float) -> None:
    """200 tokens in float32, with GPT-2's layout and Llama's layout with grouped heads."""
    import transformers

    shape = {"vocab_size": 300, "n_layer": 2, "n_head": 4, "d_model": 32, "context_length": 256}
    prompt = random_tokens(9, vocab_size=300).tolist()
    for layout in ("gpt2-tied", "llama-grouped"):
        model = small_model(layout, **shape)
        config = SamplingConfig(max_new_tokens=200, temperature=0.0, repetition_penalty=penalty)
        decoder = Decoder(model, prompt, max_new_tokens=200, n_rows=2)
        single = [step.token for step in decoder.generate(config, seed=1)]
        rows: list[list[int]] = [[], []]
        for row, step in decoder.batch(config, seeds=[1, 2]):
            rows[row].append(step.token)
        theirs = as_transformers(transformers, model)
        settings = transformers.GenerationConfig(
            max_new_tokens=200, do_sample=False, repetition_penalty=penalty, pad_token_id=0
        )
        ids = torch.tensor([prompt])
        output = theirs.generate(ids, settings, attention_mask=torch.ones_like(ids))
        assert [single, *rows] == [output[0, len(prompt) :].tolist()] * 3


def as_transformers(transformers: Any, model: GPT) -> Any:
    from minigpt.checkpoint.families import model_config_to_hf
    from minigpt.checkpoint.weights import tensors_to_hf

    settings = model_config_to_hf(model.config, None) | {"eos_token_id": None}
    config = transformers.AutoConfig.for_model(**settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = tensors_to_hf(model.config, dict(model.state_dict()))
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs
