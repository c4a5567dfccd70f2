"""What the quickstart shows at its end: numbers before and after, answers side by side, speed, and where everything is."""

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.run import Result
from raykd.tracking import throughput

MEASURES = {
    "reverse_kl": "reverse KL to the teacher, on own answers (nats a token)",
    "forward_kl": "forward KL to the teacher, on reference answers (nats a token)",
    "loss": "cross-entropy on reference answers (nats a token)",
    "response_length": "answer length (tokens)",
}
QUESTIONS = (
    "collections: def popitem(self)\n",
    "os: def remove(path)\n",
    "socket: def close(self)\n",
    "json: class JSONParser\n",
)


def show(console: Console, distilled: Result, control: Result, teacher: Path) -> None:
    """Print everything."""
    numbers = Table(title="held-out prompts", title_justify="left")
    numbers.add_column("")
    for name in ("untrained", "SFT alone", "SFT + MiniLLM"):
        numbers.add_column(name, justify="right")
    for key, meaning in MEASURES.items():
        numbers.add_row(meaning, *(f"{result[key]:.3f}" for result in (distilled.before, control.after, distilled.after)))
    console.print(numbers)

    answers = Table(title="greedy answers to signatures that are not in the data", title_justify="left", show_lines=True)
    models = {"teacher": teacher, "SFT alone": control.student, "SFT + MiniLLM": distilled.student}
    for name in ("question", *models):
        answers.add_column(name)
    written = [answer(folder, QUESTIONS) for folder in models.values()]
    for index, question in enumerate(QUESTIONS):
        answers.add_row(question.strip(), *(column[index] for column in written))
    console.print(answers)

    speed = Table(title="response tokens per second", title_justify="left")
    speed.add_column("stage of the pipeline")
    speed.add_column("tokens/s", justify="right")
    for verb, rate in throughput(distilled.folder).items():
        speed.add_row(verb, f"{rate:,.0f}")
    console.print(speed)
    for name, path in {"distilled run": distilled.folder, "control": control.folder, "student": distilled.student}.items():
        console.print(f"{name}: {os.path.relpath(path)}", highlight=False)


def answer(folder: Path, questions: tuple[str, ...]) -> list[str]:
    """Greedy answers of a saved model, through plain transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for question in questions:
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers
