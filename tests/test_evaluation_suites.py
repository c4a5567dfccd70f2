"""What is asked: prompts, references and labels of the built-in suites and of one's own."""

import json
from pathlib import Path

import pytest
from example_text import text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raykd.commands import Evaluate
from raykd.evaluation.question_sets import ask_all, share_ids
from raykd.evaluation.suites import (
    ALPACA,
    BUILT_IN,
    LabelSuite,
    Metric,
    Suite,
    find_suites,
    label_questions,
    questions,
)
from raykd.sources import Pairs, read_rows

OTHERS = Suite(name="", data=ALPACA)


@pytest.fixture
def gpt2(data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(data / "models/gpt2-tokenizer")


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only(name: str) -> Suite:
    (suite,) = find_suites(name, OTHERS)
    assert isinstance(suite, Suite)
    return suite


def first_row(suite: Suite) -> Pairs:
    return suite.data.model_copy(update={"limit": 1})


@pytest.mark.parametrize(("name", "rows"), [("dolly", 500), ("self_inst", 252), ("vicuna", 80)])
def test_all_rows_of_minillms_suites_fit_gpt2_with_256_new_tokens(name: str, rows: int, gpt2: PreTrainedTokenizerBase):
    suite = only(name)
    read = read_rows(suite.data)
    assert len(read) == rows and suite.max_tokens == 256
    # MiniLLM's public code cuts prompts behind 256 tokens, "### Response:" included; here they stay whole as far as they fit.
    asked = questions(suite, read, gpt2, 1024 - suite.max_tokens)
    assert len(asked) >= 0.97 * rows


def test_a_question_is_the_papers_prompt_and_its_reference(gpt2: PreTrainedTokenizerBase):
    suite = only("dolly")
    rows = read_rows(suite.data)
    first = questions(suite, rows, gpt2, 768)[0]
    assert first.row == 0 and first.references == (rows[0]["output"],)
    assert gpt2.decode(list(first.prompt.tokens)) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        f"When did Virgin Australia start operating?\n\n### Input:\n{rows[0]['input']}\n\n### Response:\n"
    )
    assert gpt2.decode(list(first.prompt.response[: first.reference_length])) == rows[0]["output"]
    short = questions(suite.model_copy(update={"max_tokens": 3}), rows, gpt2, 768)[0]
    assert short.reference_length == first.reference_length > 3 == len(short.prompt.response)
    without_input = questions(only("vicuna"), read_rows(first_row(only("vicuna"))), gpt2, 768)[0]
    assert str(gpt2.decode(list(without_input.prompt.tokens))).endswith("time management skills?\n\n### Response:\n")


def test_every_built_in_suite_reads_its_rows(data: Path, gpt2: PreTrainedTokenizerBase):
    for suite in find_suites(",".join(suite.name for suite in BUILT_IN), OTHERS):
        rows = read_rows(suite.data.model_copy(update={"limit": 20}))
        if isinstance(suite, LabelSuite):
            asked = label_questions(suite, rows, gpt2, 900)
            assert {question.label for question in asked} == {0, 1} and len(asked[0].prompts) == 2
        else:
            assert all(question.references[0] for question in questions(suite, rows, gpt2, 700))


def test_several_references_a_number_and_a_translation(gpt2: PreTrainedTokenizerBase, data: Path):
    def first(name: str):
        return questions(only(name), read_rows(first_row(only(name))), gpt2, 768)[0]

    assert len(first("dialogsum").references) == 3
    assert first("gsm8k").references == ("18",) and first("gsm8k").reference_length == 1
    assert only("gsm8k").metric is Metric.EXACT_MATCH
    german = gpt2.decode(list(first("multi30k").prompt.tokens))
    assert "into English." in german and "### Input:\nEin Mann mit einem orangefarbenen Hut" in german


def test_a_file_of_ones_own_gets_the_given_templates_and_metric(tmp_path: Path, gpt2: PreTrainedTokenizerBase):
    path = write(tmp_path / "mine.jsonl", {"q": "2 + 2?", "a": ["4", "four"], "gold": "4"})
    templates = Suite(name="", data=Pairs(path="", prompt="{q} ", response="{gold}"), references="a", metric=Metric.BLEU)
    suite, built_in, hub = find_suites(f"{path}, vicuna, owner/set@dev", templates)
    assert isinstance(suite, Suite) and suite.name == path and suite.metric is Metric.BLEU
    (question,) = questions(suite, read_rows(suite.data), gpt2, 10)
    assert gpt2.decode(list(question.prompt.tokens)) == "2 + 2? " and question.references == ("4", "four")
    assert built_in.name == "vicuna" and "Response" in built_in.data.prompt
    assert (hub.data.path, hub.data.split) == ("owner/set", "dev")


def test_a_chat_model_is_asked_in_its_template(gpt2: PreTrainedTokenizerBase):
    gpt2.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    suites = find_suites("vicuna,sst2", OTHERS)
    free, labelled = (Evaluate(models=("m",), chat=True, system="Be kind.", limit=2)._asked(suite) for suite in suites)
    assert isinstance(free, Suite) and isinstance(labelled, LabelSuite)
    rows = read_rows(free.data)
    plain, asked = questions(only("vicuna"), rows, gpt2, 768)[0], questions(free, rows, gpt2, 768)[0]
    wrapped = f"<system>Be kind.<user>{gpt2.decode(list(plain.prompt.tokens))}<assistant>"
    assert gpt2.decode(list(asked.prompt.tokens)) == wrapped and asked.references == plain.references
    (no, _), *_ = (question.prompts for question in label_questions(labelled, read_rows(labelled.data), gpt2, 768))
    assert str(gpt2.decode(list(no.tokens))).endswith("<assistant>") and gpt2.decode(list(no.response[:-1])) == "negative"


def test_what_is_wrong_with_a_suite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: PreTrainedTokenizerBase):
    with pytest.raises(ValueError, match=r"suite dollly is not known; choose from dolly, .*, or give a file"):
        find_suites("dollly", OTHERS)
    row = {"instruction": "Say a.", "input": "", "output": "a", "label": 7}
    with pytest.raises(ValueError, match=r"suite mine, row 1: no accepted answer in the field 'golden'"):
        questions(Suite(name="mine", data=ALPACA, references="golden"), [row], gpt2, 99)
    with pytest.raises(ValueError, match=r"suite mine, row 1: label is 7, which is no index into its words no, yes"):
        label_questions(LabelSuite(name="mine", data=ALPACA, words=("no", "yes")), [row], gpt2, 99)
    with pytest.raises(ValueError, match=r"suite mine: .*raise max_prompt"):
        questions(Suite(name="mine", data=ALPACA), [row], gpt2, 3)
    with pytest.raises(ValueError, match=r"data\.response is not set"):
        Suite(name="mine", data=Pairs(path="x", response=None))
    monkeypatch.setenv("RAYKD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="does not exist; set RAYKD_DATA"):
        find_suites("dolly", OTHERS)


def test_all_models_are_asked_the_same_rows(tmp_path: Path, data: Path):
    """A tokenizer of 512 pieces makes a prompt longer, and so does a shorter context."""
    long, short = {"instruction": "word " * 90, "input": "", "output": "b"}, {"instruction": "a?", "input": "", "output": "b"}
    suite = Suite(name="mine", data=ALPACA.model_copy(update={"path": write(tmp_path / "m.jsonl", long, short)}), max_tokens=8)
    stories, wide = str(data / "models/stories260K"), tmp_path / "wide"
    wide.mkdir()
    AutoTokenizer.from_pretrained(data / "models/gpt2-tokenizer").save_pretrained(wide)
    (wide / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    alone, none = ask_all([str(wide)], [suite], None)
    assert alone[str(wide)].rows("mine") == {0, 1} and none == {"mine": 0}
    question_sets, left_out = ask_all([stories, str(wide)], [suite], 256)
    assert [question_set.rows("mine") for question_set in question_sets.values()] == [{1}, {1}] and left_out == {"mine": 1}
    with pytest.raises(ValueError, match="different tokenizers"):
        share_ids(question_sets, str(wide))
    with pytest.raises(ValueError, match="answers of 600 tokens fill the context"):
        ask_all([stories], [suite.model_copy(update={"max_tokens": 600})], None)


def test_a_model_that_is_not_there_is_named(data: Path):
    suite = only("vicuna")
    with pytest.raises(ValueError, match=r"model ./no/such: no such folder"):
        ask_all(["./no/such"], [suite], None)
    with pytest.raises(ValueError, match="cannot be loaded"):
        ask_all([str(text().tokenizer.parent)], [suite], None)
