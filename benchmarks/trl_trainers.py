"""TRL's trainers as the benchmarks run them: timed, with our tokens counted.

Both learn on policy from ``folder``'s student, teacher and prompts.jsonl, in the models' dtype, activations kept, reverse KL.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of a trainer's steps and of generation in them, and tokens written; the first steps are not in the result."""

    def __init__(self, warm_up: int) -> None:
        self.seconds: dict[str, list[float]] = {"step": [], "generate": [], "tokens": []}
        self._warm_up, self._begun = warm_up, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the responses are written."""
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimiser."""
        self.seconds["step"].append(time.perf_counter() - self._begun)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Counts the time in it."""
        started = time.perf_counter()
        yield
        self.seconds["generate"].append(time.perf_counter() - started)

    def result(self) -> dict[str, list[float]]:
        """What is not generation is scoring and learning."""
        seconds = {name: values[self._warm_up :] for name, values in self.seconds.items()}
        rest = [step - generate for step, generate in zip(seconds["step"], seconds["generate"], strict=True)]
        return seconds | {"score and learn": rest}


def distillation_trainer(
    folder: Path, clock: Clock, steps: int, batch: int, rate: float, max_new_tokens: int, *, by_vllm: bool = False
) -> Any:
    """DistillationTrainer, which writes with transformers as it does by default, or ``by_vllm`` in its own process."""
    from datasets import load_dataset
    from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]

    # Its share of the memory is of all of the machine's; VLLM_CPU_KVCACHE_SPACE bounds its cache.
    vllm: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05} if by_vllm else {}

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with clock.generating():
                return super()._generate_single_turn(*args, **kwargs)

        def _compute_loss(self, model: Any, inputs: Any, *args: Any) -> Any:
            clock.seconds["tokens"].append(int(inputs["completion_mask"].sum()))
            return super()._compute_loss(model, inputs, *args)

    return Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "student"),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher"),
        args=DistillationConfig(**_settings(folder, steps, batch, rate), max_completion_length=max_new_tokens, **vllm),
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
        callbacks=[clock],
    )


def gkd_trainer(folder: Path, clock: Clock, steps: int, batch: int, rate: float, max_new_tokens: int) -> Any:
    """GKDTrainer; its chat template only joins the texts, and the answers of the data are never learned from."""
    from datasets import load_dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    class Timed(GKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(*args: Any, **kwargs: Any) -> Any:
            with clock.generating():
                outputs = GKDTrainer.generate_on_policy_outputs(*args, **kwargs)
            clock.seconds["tokens"].append(int((outputs[2] != -100).sum()))
            return outputs

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def chat(row: dict[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": " The"}]}

    data = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train").map(chat, remove_columns=["prompt"])
    return Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "student"),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher"),
        args=GKDConfig(**_settings(folder, steps, batch, rate), lmbda=1.0, max_new_tokens=max_new_tokens),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock],
    )


def _settings(folder: Path, steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "use_cpu": True,
        "bf16": AutoConfig.from_pretrained(folder / "student").dtype == torch.bfloat16,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "temperature": 1.0,
        "beta": 1.0,
    }
