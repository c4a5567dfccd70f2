"""A model by the name that users give it."""

from pathlib import Path

import pytest

from raykd.pretrained import locate


def test_a_folder_a_run_directory_and_a_name_on_the_hub_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    student = tmp_path / "runs/mine/student"
    student.mkdir(parents=True)
    assert locate("student.path", "./model") == locate("student.path", "model") == str(tmp_path / "model")
    assert locate("student.path", "runs/mine") == str(tmp_path / "runs/mine"), "no student has been saved there"
    (student / "config.json").write_text("{}")
    assert locate("student.path", "runs/mine") == str(student)
    assert locate("student.path", "owner/name") == "owner/name"
    with pytest.raises(ValueError, match=r"student.path ./no/such: no such folder; give a Hugging Face model folder, a run dir"):
        locate("student.path", "./no/such")
