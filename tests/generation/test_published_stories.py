"""A published Llama model with grouped heads generates its published story."""

import itertools
import json
from pathlib import Path

from minigpt.checkpoint.model_folder import read_model
from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder

BEGIN_OF_TEXT = 1


def sentencepiece_ids(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """Merge the adjacent pair with the best score until none is left (SentencePiece BPE)."""
    pieces = list(" " + text)
    known = dict(zip(tokens, scores, strict=True))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(pieces)]
        merges = [(known[pair], -i) for i, pair in enumerate(pairs) if pair in known]
        if not merges:
            return [tokens.index(piece) for piece in pieces]
        i = -max(merges)[1]
        pieces[i : i + 2] = [pairs[i]]


def test_stories260k_generates_its_published_story(shared: Path) -> None:
    folder = shared / "weights" / "stories260K"
    vocabulary = json.loads((folder / "sp_vocab.json").read_text(encoding="utf-8"))
    tokens, scores = vocabulary["tokens"], vocabulary["scores"]
    model = read_model(folder).model
    assert (model.config.n_head, model.config.n_kv_head) == (8, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032

    prompt = [BEGIN_OF_TEXT, *sentencepiece_ids("Once upon a time", tokens, scores)]
    assert "".join(tokens[token] for token in prompt[1:]) == " Once upon a time"
    steps = Decoder(model, prompt).generate(
        SamplingConfig(temperature=0.0, max_new_tokens=60), seed=0
    )
    story = "".join(tokens[step.token] for step in steps)
    assert story.startswith(", there was a little girl named Lily. She loved to play outside")
