"""The report's curves as a Weights & Biases workspace: the same names, sections and order."""

from wandb_workspaces.reports.v2 import LinePlot
from wandb_workspaces.reports.v2.interface import PanelTypes
from wandb_workspaces.workspaces import Section, Workspace

from raykd.report.meanings import HELD_OUT, LOSS, ON_TEXT, SECTIONS, VERBS, find
from raykd.report.meanings import Section as Described
from raykd.usage import LANES


def dashboard(entity: str, project: str, name: str = "raykd") -> Workspace:
    """Not saved yet: ``save()`` needs a key and gives the page its ``url``."""
    time: list[PanelTypes] = [
        _panel([f"seconds/{verb}" for verb in VERBS], "Seconds of each stage, per step"),
        _panel([f"waiting/{lane}" for lane in LANES], "Seconds that each waited, per step"),
        _panel([f"tokens/{verb}" for verb in VERBS], "Response tokens of each stage, per step"),
    ]
    training = [described for described in SECTIONS if described.metrics]
    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            _section(HELD_OUT, "heldout/", is_open=True),
            Section(name="Loss", panels=[_panel(["loss"], f"{LOSS.title} [{LOSS.unit}]")], is_open=True),
            *(_section(described, "", is_open=False) for described in training),
            Section(name="Time", panels=time),
        ],
    )


def _section(described: Described, prefix: str, *, is_open: bool) -> Section:
    on_text = {name: meaning for name in ON_TEXT for section, meaning in [find(name)] if section is described}
    panels: list[PanelTypes] = [
        _panel([prefix + name], f"{meaning.title} [{meaning.unit}]" if meaning.unit else meaning.title)
        for name, meaning in {**described.metrics, **on_text}.items()
    ]
    return Section(name=described.title, panels=panels, is_open=is_open)


def _panel(metrics: list[str], title: str) -> LinePlot:
    return LinePlot(x="step", y=list(metrics), title=title)
