"""The language model of a checkpoint for texts and images, alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from example_text import text_tokenizer
from test_student import LLAMA_LIKE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from raykd import commands
from raykd.algorithms import SFT
from raykd.experiment import Experiment, Model, Stage
from raykd.language_model import save_language_model
from raykd.models import check_models
from raykd.pretrained import load_config, load_model
from raykd.sources import Pairs

EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WORDS = {**LLAMA_LIKE, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**WORDS, "model_type": "gemma3_text"},
        "vision_config": {**EYES, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
    },
    "mistral3": {  # ties its embeddings, as the configuration of its language model does not say
        "text_config": {**WORDS, "model_type": "mistral"},
        "vision_config": {**EYES, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 5,
    },
    "llava": {
        "text_config": {**WORDS, "model_type": "llama"},
        "vision_config": {**EYES, "model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
}


def saved(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_the_whole_does_with_text(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "whole", kind)
    monkeypatch.setattr("sys.argv", ["raykd", "language-model", str(tmp_path / "whole"), str(tmp_path / "alone")])
    commands.main()
    alone: Any = load_model(str(tmp_path / "alone")).eval()
    ids = torch.tensor([[1, 9, 30, 4, 60]])
    torch.testing.assert_close(alone(ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0)
    assert alone.generation_config.eos_token_id == [2, 7]
    assert load_config("student.path", str(tmp_path / "alone")).model_type == MODELS[kind]["text_config"]["model_type"]


def test_what_cannot_be_written_alone_is_named(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA_LIKE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"takes text alone already; name it as it is"):
        save_language_model(str(tmp_path), tmp_path / "alone")
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no class for the language model of qwen2_5_vl alone"):
        save_language_model(str(tmp_path), tmp_path / "alone")


def test_a_run_asks_for_the_language_model_alone(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3")
    student = Model(path=str(tmp_path))
    run = Experiment(name="x", student=student, teacher=None, data=Pairs(path="x"), stages=(Stage(algorithm=SFT(), steps=1),))
    with pytest.raises(
        ValueError, match=r"student.path .*: gemma3 takes more than text; `raykd language-model MODEL FOLDER` writes"
    ):
        check_models(run)
