"""What the quickstart shows at its end: numbers before and after, answers side by side, speed, and where everything is."""

import os
from pathlib import Path

import spoken_dates
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.report import write_report
from raykd.run import Result
from raykd.usage import throughput

MEASURES = {
    "reverse_kl": "reverse KL to the teacher, on own answers, nats a token",
    "forward_kl": "forward KL to the teacher, on reference answers, nats a token",
    "loss": "cross-entropy on reference answers, nats a token",
    "response_length": "answer length (tokens)",
}
NUM_CHECKED, NUM_SHOWN = 400, 4


def show(console: Console, distilled: Result, control: Result, teacher: Path) -> None:
    """Print everything."""
    models = {"teacher": teacher, "SFT alone": control.student, "SFT + MiniLLM": distilled.student}
    questions = [prompt for prompt, _ in spoken_dates.sample(NUM_CHECKED, seed=99)]  # the training data has another seed
    written = {name: answer(folder, questions) for name, folder in models.items()}

    numbers = Table(title="on held-out dates", title_justify="left")
    numbers.add_column("")
    for name in ("untrained", *models):
        numbers.add_column(name, justify="right")
    for key, meaning in MEASURES.items():
        values = (distilled.before, {}, control.after, distilled.after)
        numbers.add_row(meaning, *(f"{value[key]:.3f}" if key in value else "" for value in values))
    shares = {name: sum(map(spoken_dates.is_right, questions, column)) / NUM_CHECKED for name, column in written.items()}
    numbers.add_row("sampled answers that are right", "", *(f"{share:.1%}" for share in shares.values()))
    console.print(numbers)

    answers = Table(title="sampled answers", title_justify="left", show_lines=True)
    for name in ("question", *models):
        answers.add_column(name)
    for index in range(NUM_SHOWN):
        question = questions[index]
        said = [
            column[index] + ("  [right]" if spoken_dates.is_right(question, column[index]) else "") for column in written.values()
        ]
        answers.add_row(question.strip(), *map(escape, said))
    console.print(answers)

    speed = Table(title="response tokens per second of the distilled run", title_justify="left")
    speed.add_column("stage of the pipeline")
    speed.add_column("tokens/s", justify="right")
    for verb, rate in throughput(distilled.folder).items():
        speed.add_row(verb, f"{rate:,.0f}")
    console.print(speed)
    report = write_report([distilled.folder, control.folder], distilled.folder / "report.html")
    places = {"distilled run": distilled.folder, "control": control.folder, "student": distilled.student, "report": report}
    for name, path in places.items():
        console.print(f"{name}: {os.path.relpath(path)}", highlight=False, soft_wrap=True)


def answer(folder: Path, questions: list[str]) -> list[str]:
    """Sampled answers of a saved model, through plain transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(question)["input_ids"] for question in questions])  # all dates have the same length
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    written = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # transformers' own annotation is wrong
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=24, eos_token_id=end, pad_token_id=end
    )
    return tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
