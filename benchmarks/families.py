"""Which families of models work from end to end, beside transformers' own code (eager attention, float32).

    python benchmarks/families.py [gemma2 mixtral ...]      all by default; about a minute each on two cores

Small models with random weights, strong enough that windows, caps and position embeddings show, and texts longer than windows.
Of each family: how the learner reads texts; the largest difference of log-probs, in nats, between transformers' code and the
learner's mean over a text, what an engine records before and after three updates of the weights, and what a teacher on vLLM says.
Learner and engine have a process of their own for each family, and so has the teacher. Results go to ``results/families.json``;
docs/models.md has them in words.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from folders import temporary
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import AutoConfig, AutoModelForCausalLM

from raykd.algorithms import SFT
from raykd.algorithms.base import Needs
from raykd.collate import LossTerm
from raykd.experiment import EngineConfig, LearnerConfig, TeacherConfig
from raykd.records import Rollout, Row, Source, Totals

VOCABULARY, EOS, LONGEST, UPDATES = 512, 2, 100, 3
RESULTS = Path(__file__).parent / "results" / "families.json"
FOUND = "found.json"
SLIDING, FULL = "sliding_attention", "full_attention"
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 32}
WINDOWS = {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32}
"""Of the widths that vLLM's CPU kernels have."""
DEEPSEEK = {**ROUTED, **LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
GPT2 = {name: SMALL[name] for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    "mistral": {**SMALL, **HEADS, "sliding_window": 8},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, **HEADS},
    "gemma": {**SMALL, **HEADS},
    "gemma2": {**SMALL, **HEADS, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    | {"sliding_window": 8},
    "gemma3_text": {**SMALL, **HEADS, **WINDOWS, "query_pre_attn_scalar": 32},
    "phi": {**SMALL, "num_key_value_heads": 2},
    "phi3": {**SMALL, "sliding_window": 8},
    "olmo2": SMALL,
    "olmo3": {**SMALL, **WINDOWS},
    "smollm3": {**SMALL, "num_hidden_layers": 4},
    "granite": {**SMALL, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "cohere2": {**SMALL, **HEADS, **WINDOWS, "logit_scale": 0.25},
    "glm4": {**SMALL, **HEADS, "partial_rotary_factor": 0.5, "attention_bias": True},
    "exaone4": {**SMALL, **HEADS, **WINDOWS, "sliding_window_pattern": 4},
    "gpt_neox": {**SMALL, "num_key_value_heads": 2},
    "gpt2": {**GPT2, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "starcoder2": {**SMALL, "sliding_window": 8},
    "nemotron": {**SMALL, **HEADS},
    "stablelm": {**SMALL, "num_key_value_heads": 2},
    "falcon": {**GPT2, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen3_moe": {**SMALL, **HEADS, **EXPERTS},
    "mixtral": {**SMALL, **EXPERTS, "sliding_window": None, "router_jitter_noise": 0.1},
    "olmoe": {**SMALL, **EXPERTS, "num_key_value_heads": 2},
    "granitemoe": {**SMALL, **EXPERTS, "logits_scaling": 2.0},
    "gpt_oss": {**SMALL, **HEADS, **EXPERTS, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
    "seed_oss": {**SMALL, **HEADS},
    "arcee": {**SMALL, **HEADS},
    "ministral": {**SMALL, **HEADS, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
    "ministral3": {**SMALL, **HEADS},
    "apertus": SMALL,
    "cwm": {**SMALL, **HEADS, **WINDOWS},
    "gemma4_text": {**SMALL, **HEADS, **WINDOWS, "global_head_dim": 32, "hidden_size_per_layer_input": 16}
    | {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
    "vaultgemma": {**SMALL, **HEADS, "sliding_window": 8, "layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 32}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "bloom": {**GPT2, "hidden_size": 64, "n_layer": 2, "n_head": 2, "pad_token_id": 0},
    "gptj": {**GPT2, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "rotary_dim": 16},
    "llama4_text": {**SMALL, **HEADS, **EXPERTS, "num_experts_per_tok": 1, "num_hidden_layers": 4, "attention_chunk_size": 32}
    | {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
    "deepseek_v2": {**SMALL, **DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**SMALL, **DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {**SMALL, **DEEPSEEK},
    "glm4_moe": {**SMALL, **HEADS, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": True},
    "dots1": {**SMALL, **HEADS, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {**SMALL, **HEADS, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {**SMALL, **EXPERTS, "layer_types": ["conv", FULL], "num_dense_layers": 1},
    "qwen2_moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 96},
    "phimoe": {**SMALL, **EXPERTS},
    "granitemoehybrid": {**SMALL, **EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 96},
    "falcon_h1": {**SMALL, **HEADS, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16}
    | {"mamba_chunk_size": 32},
}


def save_model(family: str, folder: Path) -> None:
    """A model whose norms and biases, those of routers among them, are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32)
    state = model.state_dict()
    _disturb((tensor for name, tensor in state.items() if tensor.dim() == 1 or name.endswith("bias")), 0.15)
    model.save_pretrained(folder)


@torch.no_grad()
def _disturb(tensors: Iterable[torch.Tensor], size: float) -> None:
    for tensor in tensors:
        tensor.add_(size * torch.randn(tensor.shape))


def given_texts() -> list[Rollout]:
    """Some share a prompt, one has none, one is a single token."""
    generator = torch.Generator().manual_seed(1)
    ids = iter(torch.randint(3, VOCABULARY, (1000,), generator=generator).tolist())
    shared = tuple(next(ids) for _ in range(12))
    shapes = ((shared, 40), ((5, 7, 9), 1), (shared, 30), ((), 25), ((9,), 50))
    return [_text(prompt, tuple(next(ids) for _ in range(length)), Source.DATASET) for prompt, length in shapes]


def _text(prompt: Sequence[int], tokens: Sequence[int], source: Source) -> Rollout:
    return Rollout(prompt_id="p", sample=0, prompt_tokens=tuple(prompt), tokens=tuple(tokens), source=source)


def note(folder: Path, check: str, found: Any) -> None:
    """Add what was found to the family's ``found.json``."""
    noted = json.loads((folder / FOUND).read_text()) if (folder / FOUND).exists() else {}
    (folder / FOUND).write_text(json.dumps(noted | {check: found}))


def teach(folder: Path) -> None:
    """Note the log-probs of the given texts by a teacher on vLLM."""
    from raykd.teacher.worker import Teacher

    config = TeacherConfig(dtype="float32", backend="vllm", engine=EngineConfig(cpu_cache_gib=0.1))
    teacher = Teacher(str(folder), config, vocab_size=VOCABULARY, max_length=256)
    note(folder, "teacher", [row.tolist() for row in teacher.score(given_texts(), Needs.SAMPLED).logprobs_by_rollout()])


class Student:
    """Learner and engine of one family."""

    def __init__(self, folder: Path) -> None:
        from raykd.learner import Learner
        from raykd.rank import meeting_place

        self._folder = folder
        self._meeting_place = meeting_place("127.0.0.1")
        address = "127.0.0.1", self._meeting_place.port
        config = LearnerConfig(dtype="float32", threads=2)
        self._learner = Learner(str(folder), config=config, rank=0, address=address, vocab_size=VOCABULARY)
        for module in self._learner._student.modules():
            module.do_not_compile = True  # vLLM has some of transformers' classes ask that, in the whole process

    def learn(self) -> None:
        """Note how the learner reads texts and its mean loss on each."""
        note(self._folder, "texts", self._learner._student.lay.__name__)
        note(self._folder, "learner", [self._mean_loss(text) for text in given_texts()])

    def _mean_loss(self, text: Rollout) -> float:
        row = Row(rollout=text)
        return self._learner.evaluate([LossTerm(algorithm=SFT(), rows=[row], totals=Totals.of([row]))])["loss"]

    async def write(self) -> None:
        """Note what the engine writes before and after three updates of the weights, and save those."""
        from raykd.rollout.config import EngineSettings
        from raykd.rollout.requests import GenerationRequest
        from raykd.rollout.worker import RolloutWorker

        settings = EngineSettings(dtype="float32", max_length=256, vocab_size=VOCABULARY, cpu_cache_gib=0.1)
        worker = RolloutWorker(str(self._folder), settings, (EOS,))
        prompts = [text.prompt_tokens or (1,) for text in given_texts()]

        async def written() -> list[Any]:
            requests = [GenerationRequest(prompt_id=str(i), sample=0, prompt_tokens=p, salt=0) for i, p in enumerate(prompts)]
            rollouts = await worker.generate(requests, 0.0, LONGEST)
            return [[rollout.prompt_tokens, rollout.tokens, rollout.student_logprobs] for rollout in rollouts]

        note(self._folder, "engine", await written())
        for version in range(1, UPDATES + 1):
            _disturb(self._learner._student.model.parameters(), 0.05)
            update = self._learner.publish(version)
            assert update is not None
            await worker.load(update)
        note(self._folder, "updated", await written())
        self._learner.save_student(self._folder / "updated")


def logprobs(model: Any, text: Rollout) -> list[float]:
    """By transformers' own code; 0 for a first token that nothing predicts."""
    ids = torch.tensor([text.prompt_tokens + text.tokens])
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :, :VOCABULARY].float().log_softmax(-1)
    found = logits[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()
    return (found if text.prompt_tokens else [0.0, *found])[-len(text.tokens) :]


def compare(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The largest differences, or that a process ended before."""
    original, given = eager(folder), given_texts()
    rows: dict[str, Any] = {"texts": found["texts"]}
    means = [-sum(own) / len(own) for own in (logprobs(original, text)[text.first_predicted :] for text in given)]
    rows["learner"] = max(abs(a - b) for a, b in zip(found["learner"], means, strict=True))
    for check in ("engine", "updated", "teacher"):
        if check not in found:
            rows[check] = "ended"
            continue
        model = eager(folder / "updated") if check == "updated" else original
        texts = given if check == "teacher" else [_text(p, tokens, Source.STUDENT) for p, tokens, _ in found[check]]
        recorded = found[check] if check == "teacher" else [logprobs for _, _, logprobs in found[check]]
        rows[check] = max(
            abs(a - b)
            for text, ours in zip(texts, recorded, strict=True)
            for a, b in zip(ours[text.first_predicted :], logprobs(model, text)[text.first_predicted :], strict=True)
        )
    return rows


def eager(folder: Path) -> Any:
    """The model by transformers' own code."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def process(part: str, folder: Path) -> None:
    """One of the two processes of a family."""
    if part == "teacher":
        teach(folder)
    else:
        student = Student(folder)
        student.learn()
        asyncio.run(student.write())


def run(family: str, console: Console) -> dict[str, Any]:
    """Both processes of a family, and what comes of them."""
    folder = temporary("family")
    save_model(family, folder)
    for part in ("student", "teacher"):
        command = [sys.executable, __file__, family, "--part", part, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            console.print(f"{family}, {part}: {done.stderr.strip().splitlines()[-1]}", markup=False)
    return compare(folder, json.loads((folder / FOUND).read_text()))


def main() -> None:
    """Each family in turn, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # with folder: one process of a family
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        process(options.part, options.folder)
        sys.stdout.flush()
        os._exit(0)  # engines would take long to close
    if unknown := sorted({*options.families} - {*FAMILIES}):
        parser.error(f"unknown families: {', '.join(unknown)}; choose from {', '.join(FAMILIES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console, checks = Console(width=130), ("texts", "learner", "engine", "updated", "teacher")
    table = Table("family", *checks)
    for family in options.families:
        found = run(family, console)
        results[family] = {"measured": stamp()} | found
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        table.add_row(family, *(f"{value:.0e}" if isinstance(value, float) else value for value in map(found.get, checks)))
    console.print(table)


if __name__ == "__main__":
    main()
