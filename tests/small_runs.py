"""What the tests of whole runs share: a small teacher that has learned something, and settings for two cores."""

from pathlib import Path
from typing import Any

import torch
from example_text import text, text_tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.experiment import EngineConfig, Experiment, LearnerConfig, Model, RolloutConfig, TeacherConfig, TrackingConfig
from raykd.prompts import Prompts, PromptStream
from raykd.sources import Pairs, read_rows
from raykd.tokenise import tokenise

MAX_PROMPT, MAX_RESPONSE = 24, 24
ON_CPU = EngineConfig(dtype="float32", cpu_cache_gib=0.25)


def llama(hidden: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }


def small_run(folder: Path, runs: Path, **settings: Any) -> Experiment:
    """A run of a student from scratch with the tokenizer in ``folder``, on CPU in float32; what ``settings`` name is theirs."""
    small = {
        "student": Model(path=str(folder), scratch=llama(32)),
        "data": Pairs(path=str(text().pairs)),
        "max_prompt": MAX_PROMPT,
        "max_response": MAX_RESPONSE,
        "rollout": RolloutConfig(engine=ON_CPU),
        "teachers": TeacherConfig(dtype="float32", engine=ON_CPU),
        "learner": LearnerConfig(dtype="float32"),
        "tracking": TrackingConfig(wandb=False),
        "runs": runs,
    }
    return Experiment(**small | settings)


def prompts() -> Prompts:
    source = Pairs(path=str(text().pairs))
    return tokenise(read_rows(source), source, text_tokenizer(), max_prompt=MAX_PROMPT, max_response=MAX_RESPONSE)


def save_teacher(folder: Path) -> Path:
    """A small Llama that has learned something, by a plain PyTorch loop."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    tokenizer, stream = text_tokenizer(), PromptStream(prompts(), seed=0)
    config = LlamaConfig(**{**llama(64), "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id})
    model = LlamaForCausalLM(config)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        rows = [torch.tensor(prompt.tokens + prompt.response) for prompt in stream.take(16)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        logits = model(ids.clamp(min=0)).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
