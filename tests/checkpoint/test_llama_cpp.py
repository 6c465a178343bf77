"""llama.cpp gives our ids and our greedy text with the GGUF files that we export.

Needs llama-cpp-python, which takes several minutes to compile.
"""

import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_vocabularies as vocabularies
import pytest
import torch
from fuzzed_texts import SAMPLE, fuzzed_texts
from layout_models import LAYOUTS, OTHER_FAMILIES
from small_models import randomized

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json
from minigpt.checkpoint.tools.gguf import export_gguf
from minigpt.config import ModelConfig
from minigpt.model.language_model import model_class
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding, named_tokenizer
from minigpt.text.tokenizer import BYTES_PATTERN, BytesTokenizer, Tokenizer

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

COMPUTED = {
    "gpt2-tied": LAYOUTS["gpt2-tied"],
    "gpt2-untied": {"family": "gpt2", "d_mlp": 40, "norm_eps": 1e-3},
    "llama-grouped": LAYOUTS["llama-grouped"],
    "llama-biased": LAYOUTS["llama-biased"],
    "llama-wide": {"tie_embeddings": True, "d_head": 10},
    "mistral": LAYOUTS["mistral"],
    "qwen2": LAYOUTS["qwen2"],
    "qwen3": LAYOUTS["qwen3"],
}
"""Models that llama.cpp supports."""


def small_folder(folder: Path, tokenizer: Tokenizer | None, layout: str, n_rows: int = 0) -> Path:
    vocab_size = n_rows or (tokenizer.vocab_size if tokenizer else 61)
    if layout in OTHER_FAMILIES:
        config = model_config_from_hf(OTHER_FAMILIES[layout] | {"vocab_size": vocab_size})
    else:
        shape = {"context_length": 128, "n_layer": 2, "n_head": 4, "d_model": 32}
        config = ModelConfig(vocab_size=vocab_size, **(shape | COMPUTED[layout]))
    model = model_class(config)(config)
    randomized(model)
    write_model(folder, model.eval(), tokenizer)
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that exports a folder and opens it with llama.cpp."""

    def export(folder: Path, type_: str = "f32", **options: Any) -> Any:
        path = tmp_path / f"{folder.name}.gguf"
        export_gguf(folder, path, type_)
        return llama_cpp.Llama(
            str(path), n_ctx=0, n_threads=1, verbose=False, logits_all=True, **options
        )

    return export


def logits_of(llama: Any, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


@pytest.mark.parametrize("layout", [*COMPUTED, *OTHER_FAMILIES])
def test_logits_and_greedy_ids_of_llama_cpp_equal_ours(
    layout: str, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    folder = small_folder(tmp_path / layout, BytesTokenizer(), layout)
    exact = {"type_k": 0, "type_v": 0}  # float32 cache
    llama, model = exported(folder, **exact), read_model(folder).model
    ids = list(b"Once upon a time, there was")
    with torch.no_grad():
        for _ in range(60):
            logits = model(torch.tensor([ids]))[0]
            ids.append(int(logits[-1].argmax()))
    theirs = logits_of(llama, ids)
    # llama.cpp's cache and GELU table are float16
    torch.testing.assert_close(theirs[: len(logits)], logits, atol=0.03, rtol=0.01)
    greedy = ids[:27]
    llama.reset()
    llama.eval(greedy)
    for _ in range(60):
        greedy.append(int(llama.scores[len(greedy) - 1].argmax()))
        llama.eval(greedy[-1:])
    assert greedy == ids


def round_weights(model: torch.nn.Module) -> None:
    """Round matrices as q8_0, or as f16 if their rows are not multiples of 32."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in {*model.parameters()}:
        if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
            rows = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
            parameter.copy_(torch.from_numpy(rows))
        elif parameter.dim() == 2:
            parameter.copy_(parameter.half())


@torch.no_grad()
def test_q8_0_logits_and_greedy_tokens_equal_those_of_rounded_weights(
    shared: Path, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    folder = tmp_path / "stories"
    shutil.copytree(shared / "weights" / "stories260K", folder)
    loaded, llama = read_model(folder), exported(folder, "q8_0")
    round_weights(loaded.model)
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer.encode_prompt("Once upon a time")
    ids = list(prompt)
    for _ in range(60):
        ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    theirs, ours = logits_of(llama, ids), loaded.model(torch.tensor([ids]))[0]
    difference = (theirs - ours).square().mean().sqrt()
    assert difference < 0.02 * ours.std(), (difference, ours.std())  # activations have 8 bits, too
    # Tokens of nearly equal probability may be swapped.
    chosen = theirs[len(prompt) - 1 : -1].gather(1, torch.tensor(ids[len(prompt) :])[:, None])
    assert (chosen[:, 0] >= theirs[len(prompt) - 1 : -1].amax(1) - 0.1 * ours.std()).all()


TEXTS = fuzzed_texts(400, vocabularies.WORDS)
OWN = {
    "bytes": BytesTokenizer,
    "bpe": lambda: train_bpe([SAMPLE * 3], 600),
    "gpt2": lambda: named_tokenizer("gpt2"),
    "cl100k_base": lambda: named_tokenizer("cl100k_base"),
}
"""Our own vocabularies."""
PUBLISHED = (
    *("gpt2", "smollm", "llama3", "qwen3", "gpt4", "unordered", "neox"),
    *("llama2", "mistral", "gemma"),
)
"""Miniatures of published vocabularies."""


def check_ids(llama: Any, tokenizer: Tokenizer, texts: list[str]) -> None:
    different = [
        text
        for text in texts
        if llama.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text)
    ]
    assert not different, (len(different), different[:3])


@pytest.mark.parametrize("name", OWN)
def test_llama_cpp_encodes_fuzzed_texts_to_our_ids(
    name: str,
    tmp_path: Path,
    exported: Callable[..., Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in ("gpt2", "cl100k_base"):
        shared = request.getfixturevalue("shared")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    tokenizer = OWN[name]()
    folder = small_folder(tmp_path / name, tokenizer, "llama-grouped", tokenizer.vocab_size + 7)
    llama = exported(folder)
    texts = TEXTS
    if name == "cl100k_base":  # the export warns of a difference
        texts = [text for text in texts if not re.search(r"[\r\n]\s*[^\S\r\n]\Z", text)]
    check_ids(llama, tokenizer, texts)
    end = tokenizer.end_of_text
    assert (llama.token_eos(), llama.tokenize(b"a", add_bos=True)) == (end, tokenizer.encode("a"))
    assert llama.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [end]


@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_cpp_encodes_with_other_vocabularies_to_our_ids(
    name: str, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    data, _ = vocabularies.published(getattr(vocabularies, name))
    end = max((token["id"] for token in data["added_tokens"] if token["special"]), default=5)
    tokenizer = tokenizer_from_json(data, name, end_of_text_ids=(end,))
    llama = exported(small_folder(tmp_path / name, tokenizer, "llama-grouped"))
    texts = TEXTS
    if name in ("qwen3", "neox"):  # the export warns of a difference
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    if name == "mistral":
        texts = [text for text in texts if not text.startswith((" ", "\u2581"))]
    check_ids(llama, tokenizer, texts)
    assert llama.tokenize(b"It's 12", add_bos=True) == tokenizer.encode_prompt("It's 12")
    for text, id_ in tokenizer.special_ids.items():
        assert llama.tokenize(text.encode(), add_bos=False, special=True)[-1] == id_
    assert llama.token_eos() == end


def test_llama_cpp_generates_the_published_story(
    shared: Path, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    folder = tmp_path / "stories"
    shutil.copytree(shared / "weights" / "stories260K", folder)
    loaded, llama = read_model(folder), exported(folder)
    assert loaded.tokenizer is not None
    check_ids(llama, loaded.tokenizer, TEXTS)
    prompt = loaded.tokenizer.encode_prompt("Once upon a time")
    assert llama.tokenize(b"Once upon a time", add_bos=True) == prompt
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat((ids, loaded.model(ids)[:, -1:].argmax(-1)), dim=1)
    ours = loaded.tokenizer.decode(ids[0, len(prompt) :].tolist())
    made = llama.create_completion("Once upon a time", max_tokens=60, temperature=0)
    assert made["choices"][0]["text"] == ours
    assert len(ours) > 100


def test_llama_cpp_runs_a_model_without_vocabulary(
    shared: Path, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    folder = tmp_path / "sort"
    shutil.copytree(shared / "weights" / "gpt-nano-sort", folder)
    ids = [2, 0, 1, 0, 2, 1, 0, 0, 1, 1, 2]
    with torch.no_grad():
        logits = read_model(folder).model(torch.tensor([ids]))[0]
    theirs = logits_of(exported(folder), ids)
    torch.testing.assert_close(theirs, logits, atol=0.05, rtol=0.01)


def test_llama_cpp_uses_the_chat_template_and_the_end_tokens(
    tmp_path: Path, exported: Callable[..., Any]
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")
    ranks = {bytes([b]): b for b in range(256)}
    specials = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258, "[gone]": 259}
    encoding = make_encoding("chat", BYTES_PATTERN, ranks, specials)
    tokenizer = TiktokenTokenizer("chat", encoding, (258, 257, 259))
    folder = small_folder(tmp_path / "chat", tokenizer, "qwen3")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    llama = exported(folder)
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"],
        eos_token=llama._model.token_get_text(llama.token_eos()),
        bos_token=llama._model.token_get_text(llama.token_bos()),
    )
    messages = [{"role": "system", "content": "Be <b>brief"}, {"role": "user", "content": "Hé"}]
    made = formatter(messages=messages)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    text = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made.prompt == text
    ids = llama.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == auto(text, add_special_tokens=False).input_ids
    assert llama.token_eos() == 257
    vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
    ends = [i for i in range(260) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert ends == [257, 258, 259]


@pytest.mark.parametrize("spec", ["bytes", "bpe"])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama-grouped", "qwen2", "qwen3"])
def test_greedy_ids_of_llama_cpp_after_a_prompt_equal_ours(
    layout: str, spec: str, tmp_path: Path, exported: Callable[..., Any]
) -> None:
    folder = small_folder(tmp_path / "run", OWN[spec](), layout)
    llama, loaded = exported(folder), read_model(folder)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode_prompt("Once upon a time")
    prompt = llama.tokenize(b"Once upon a time", add_bos=True)
    assert prompt == ids
    with torch.no_grad():
        for _ in range(60):
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    theirs = itertools.islice(llama.generate(prompt, temp=0), 60)
    assert [*prompt, *theirs] == ids
