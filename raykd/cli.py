"""The command line of every experiment: its fields as options, and what to do with it."""

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from raykd.experiment import Experiment
from raykd.tracking import say

KEEP_BRANCHES = (tyro.conf.AvoidSubcommands,)
"""Which algorithm a stage runs is written in the file; options change its fields."""

AUTO = Path("auto")
"""In place of a run directory: whichever there is."""
ALSO = """

Also: --resume RUN goes on with a run directory from its newest checkpoint, with the experiment that is written there and any
options, --resume auto with the newest of this name that has one, else it begins a new run: a command that may be repeated until
the run is over; --scale NAME takes another size of the same run, where the file has some; --plan prints what the run takes, in
memory, traffic and storage, and with the name of a GPU (--plan H100) about how long, and stops; --show prints the experiment as
JSON and stops."""


def main(experiment: Experiment, scales: Mapping[str, Callable[[], Experiment]] | None = None) -> None:
    """Run ``experiment`` with any of its fields changed by options: ``--stages.0.steps 50``.

    ``scales`` names other sizes of the same run, e.g. ``--scale tiny``.
    Exits with 2 and one sentence where the input is wrong, with 1 where the run failed, with 130 where it was interrupted.
    """
    console = Console()
    options, rest = _options(sorted(scales or {})).parse_known_args()
    with exit_codes(console):
        resume = options.resume
        if options.scale is not None:
            if resume not in (None, AUTO):
                raise ValueError(f"--scale {options.scale} is for new runs: one that goes on has the size that it began with")
            experiment = (scales or {})[options.scale]()
        if resume == AUTO:
            from raykd.run_directory import newest_run

            resume = newest_run(_with_options(experiment, rest))
        if resume is not None:
            from raykd.run_directory import load_experiment

            experiment = load_experiment(resume)
        experiment = _with_options(experiment, rest)
        if options.show:
            console.print_json(experiment.model_dump_json())
            return
        if options.plan is not None:
            _print_plan(experiment, options.plan, console)
            return
        from raykd.run import run

        result = run(experiment, resume=resume, console=console)
        say(console, f"student: {result.student}")


def _with_options(experiment: Experiment, options: Sequence[str]) -> Experiment:
    about = (sys.modules["__main__"].__doc__ or "") + ALSO
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="tyro")  # that the kinds of a reward have fields of the same names
        return tyro.cli(Experiment, default=experiment, args=options, description=about, config=KEEP_BRANCHES)


@contextmanager
def exit_codes(console: Console) -> Iterator[None]:
    """Exits with 2 and a line for each thing where the input is wrong, with 130 where it is interrupted."""
    try:
        yield
    except ValueError as error:
        _refuse(console, error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _refuse(console: Console, error: ValueError) -> NoReturn:
    """One line for each thing that is wrong with the input; exits with 2."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    for reason in [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems] or [str(error)]:
        text = escape(reason.replace("Value error, ", "").removeprefix(": "))
        console.print(f"[red]error:[/red] {text}", highlight=False, soft_wrap=True)
    sys.exit(2)


def _print_plan(experiment: Experiment, gpu: str, console: Console) -> None:
    from raykd.models import check_models, vocabulary
    from raykd.planning import plan

    tokenizer = check_models(experiment)
    planned = plan(experiment, tokenizer, vocabulary(experiment, tokenizer), gpu)
    console.print(planned.table())
    for note in planned.notes:
        say(console, note)


def _options(scales: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN")
    parser.add_argument("--scale", choices=scales)
    parser.add_argument("--plan", nargs="?", const="", metavar="GPU")
    parser.add_argument("--show", action="store_true")
    return parser
