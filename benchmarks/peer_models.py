"""Convert a Hugging Face folder of minigpt for CTranslate2 or ONNX Runtime.

    python peer_models.py CTranslate2|ONNX FOLDER OUT fp32|bf16|int8

A separate script, because the converters need torch and transformers, which must not count as
memory of the contender. The model contains no vocabulary: prompts are ids.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace


def write_ctranslate2(folder: Path, out: Path, precision: str) -> None:
    """Write the model for CTranslate2, which rounds the weights when it loads them."""
    from ctranslate2.converters.transformers import TransformersConverter

    names = [str(number) for number in range(_config(folder)["vocab_size"])]
    vocabulary = SimpleNamespace(
        get_vocab=lambda: {name: number for number, name in enumerate(names)},
        bos_token=names[0],
        eos_token=names[0],
        unk_token=names[0],
        extra_special_tokens=[],
        additional_special_tokens=[],
    )

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *args: object, **options: object) -> SimpleNamespace:
            return vocabulary

    Converter(str(folder)).convert(str(out))


def write_onnx(folder: Path, out: Path, precision: str) -> None:
    """Write the model for ONNX Runtime's generate()."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    paths = ["-i", str(folder), "-o", str(out), "-c", str(out)]
    subprocess.run([*builder, *paths, "-p", precision], check=True)
    path = out / "genai_config.json"
    config = json.loads(path.read_text())
    # An end token is required. A run fails if it decodes this one, which ends the text early.
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    path.write_text(json.dumps(config))


def _config(folder: Path) -> dict[str, int]:
    config: dict[str, int] = json.loads((folder / "config.json").read_text())
    return config


WRITERS = {"CTranslate2": write_ctranslate2, "ONNX": write_onnx}

if __name__ == "__main__":
    engine, folder, out, precision = sys.argv[1:]
    WRITERS[engine](Path(folder), Path(out), precision)
