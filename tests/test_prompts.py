"""Data becomes ids once: templates, boundaries, lengths, packing, and a stream that resumes."""

import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_text import text_tokenizer
from tokenizers.processors import TemplateProcessing

from raykd.chat import Chat
from raykd.prompts import Prompts, PromptStream
from raykd.records import Prompt
from raykd.sources import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Conversations, Documents, Pairs, read_rows
from raykd.tokenise import pack_text, tokenise, tokenise_documents


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_response_continues_its_prompt_and_ends_with_eos():
    tokenizer = text_tokenizer()
    rows = [{"prompt": "os: def remove(path)\n", "response": "Remove a file."}]
    (prompt,) = tokenise(rows, Pairs(path="x.jsonl"), tokenizer, max_prompt=64, max_response=64)
    assert prompt.tokens == tuple(tokenizer(rows[0]["prompt"])["input_ids"])
    assert tokenizer.decode(list(prompt.response[:-1])) == "Remove a file."
    assert prompt.response[-1] == tokenizer.eos_token_id and prompt.finished
    assert prompt.id == "x.jsonl:0"


def test_a_cut_response_has_no_eos_and_is_not_finished():
    rows = [{"prompt": "a\n", "response": "one two three four five six seven"}]
    (prompt,) = tokenise(rows, Pairs(path="x"), text_tokenizer(), max_prompt=8, max_response=3)
    assert len(prompt.response) == 3 and not prompt.finished
    assert text_tokenizer().eos_token_id not in prompt.response


def test_prompts_that_are_too_long_are_left_out_and_the_others_keep_their_names():
    rows = [{"prompt": "word " * 50, "response": "x"}, {"prompt": "a", "response": "x"}]
    (prompt,) = tokenise(rows, Pairs(path="x"), text_tokenizer(), max_prompt=8, max_response=8)
    assert prompt.id == "x:1"
    with pytest.raises(ValueError, match="no prompt has at most max_prompt=2 tokens"):
        tokenise(rows[:1], Pairs(path="x"), text_tokenizer(), max_prompt=2, max_response=8)


@pytest.mark.parametrize(("context", "expected"), [("", "### Response:\n"), ("some", "### Input:\nsome")])
def test_the_template_without_input_serves_rows_whose_optional_field_is_empty(context: str, expected: str):
    source = Pairs(path="x", prompt=ALPACA_WITH_INPUT.replace("{input}", "{context}"), prompt_without_input=ALPACA_WITHOUT_INPUT)
    rows = [{"instruction": "Do it.", "context": context, "response": "Done."}]
    (prompt,) = tokenise(rows, source, text_tokenizer(), max_prompt=512, max_response=8)
    decoded = text_tokenizer().decode(list(prompt.tokens))
    assert expected in decoded and ("### Input" in decoded) == bool(context)


def test_text_stays_as_it_stands_in_the_file(tmp_path: Path):
    table = tmp_path / "table.csv"
    table.write_text("prompt,response\n007,02139\nadd,\nNA,False\n1,2007-06-29\n")
    rows = read_rows(Pairs(path=str(table)))
    assert [tuple(row.values()) for row in rows] == [("007", "02139"), ("add", ""), ("NA", "False"), ("1", "2007-06-29")]
    dates = Pairs(path=str(write(tmp_path / "dates.jsonl", [{"prompt": "when?", "response": "2007-06-29"}])))
    with pytest.raises(
        ValueError, match=r"dates.jsonl, row 1: field 'response' was read as a datetime, .* bring the data as .csv"
    ):
        tokenise(read_rows(dates), dates, text_tokenizer(), max_prompt=8, max_response=8)


def test_special_tokens_that_a_text_brings_are_the_only_ones():
    tokenizer: Any = deepcopy(text_tokenizer())
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    plain, marked = (
        {"prompt": "a\n", "response": "b"},
        {"prompt": f"{tokenizer.bos_token}a\n", "response": f"b{tokenizer.eos_token}"},
    )
    first, second = tokenise([plain, marked], Pairs(path="x"), tokenizer, max_prompt=8, max_response=8)
    assert (first.tokens, first.response, first.finished) == (second.tokens, second.response, second.finished)
    assert first.tokens[0] == first.response[-1] == tokenizer.eos_token_id != first.tokens[1]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if terse %}Briefly: {% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "d e"}]


def chat_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer: Any = deepcopy(text_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_is_laid_out_as_the_tokenizer_does_and_ends_with_its_end_of_turn():
    tokenizer, system = chat_tokenizer(), {"role": "system", "content": "s"}
    limits: Any = {"max_prompt": 99, "max_response": 99}
    (prompt,) = tokenise([{"messages": ANSWERED}], Conversations(path="x"), tokenizer, **limits)
    assert list(prompt.tokens) == tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert list(prompt.response) == [*tokenizer("d e")["input_ids"], tokenizer.eos_token_id] and prompt.finished
    for source in (Conversations(path="x", answers=False), Conversations(path="x", answers=False, chat=Chat(system="s"))):
        rows = [{"messages": ANSWERED}, {"messages": ASKED}, {"messages": [system, *ASKED]}]
        with_answer, without, own_system = tokenise(rows, source, tokenizer, **limits)
        assert with_answer.tokens == without.tokens and with_answer.response == without.response == ()
        assert (without.tokens == own_system.tokens) == (source.chat.system is not None)


def test_a_pair_is_a_message_and_its_answer_where_it_is_a_chat():
    tokenizer, row = chat_tokenizer(), {"prompt": "c", "response": "d e"}
    source = Pairs(path="x", chat=Chat(system="s", options={"terse": True}))
    (prompt,) = tokenise([row], source, tokenizer, max_prompt=99, max_response=99)
    text = (
        f"<|im_start|>system\ns{tokenizer.eos_token}\n<|im_start|>user\nc{tokenizer.eos_token}\n<|im_start|>assistant\nBriefly: "
    )
    assert tokenizer.decode(list(prompt.tokens)) == text
    assert tokenizer.decode(list(prompt.response)) == f"d e{tokenizer.eos_token}", "though the template does not open it so"


def test_a_chat_template_writes_all_special_tokens():
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    (prompt,) = tokenise([{"messages": ANSWERED}], Conversations(path="x"), tokenizer, max_prompt=99, max_response=99)
    assert prompt.tokens[0] == tokenizer.bos_token_id != prompt.tokens[1]
    assert prompt.response.index(tokenizer.eos_token_id) == len(prompt.response) - 1


def test_an_answer_ends_where_the_student_would():
    """At any id that ends its responses, though a template goes on: Gemma's writes an end of turn, then EOS."""
    tokenizer: Any = text_tokenizer()
    turn, own = tokenizer("\n")["input_ids"][-1], tokenizer.eos_token_id
    row = {"prompt": "a", "response": "b c\n\n", "text": "one two three four\nfive"}
    for ends, last in (((own, turn), turn), ((), own)):
        (prompt,) = tokenise([row], Pairs(path="x"), tokenizer, max_prompt=9, max_response=9, eos_ids=ends)
        (continued,) = tokenise_documents([row], Documents(path="d", prompt_tokens=2), tokenizer, max_response=64, eos_ids=ends)
        for response, finished in ((prompt.response, prompt.finished), (continued.response, continued.finished)):
            assert finished and response.index(last) == len(response) - 1
    (cut,) = tokenise([row], Pairs(path="x"), tokenizer, max_prompt=9, max_response=2, eos_ids=(own, turn))
    assert len(cut.response) == 2 and not cut.finished
    (open_end,) = tokenise(
        [{"prompt": "a", "response": "b"}], Pairs(path="x"), tokenizer, max_prompt=9, max_response=9, eos_ids=(own, turn)
    )
    assert open_end.response[-1] == own, "one without an end gets the tokenizer's"


REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("messages", "template", "complaint"),
    [
        (ASKED, CHATML, "row 1: field 'messages' ends with a message of user, not with an answer of assistant"),
        (ANSWERED[-1:], CHATML, "row 1: field 'messages' has no message that asks for an answer"),
        ([], CHATML, "row 1: field 'messages' has no message that asks for an answer"),
        ("a", CHATML, "row 1: field 'messages' is no list of messages with a role and a content"),
        ([{"role": "user", "content": None}], CHATML, "row 1: field 'messages' is no list of messages with a role and a content"),
        (None, CHATML, "row 1: field 'messages' is no list of messages .* name the right field"),
        (ANSWERED, REFUSES, "x.jsonl, row 1: the chat template of tokenizer .* refuses it: roles must alternate"),
        (ANSWERED, None, "row 1: tokenizer .* has no chat template; take an instruction-tuned student"),
    ],
)
def test_a_conversation_that_cannot_be_laid_out_is_named(messages: object, template: str | None, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        tokenise(
            [{"messages": messages}], Conversations(path="x.jsonl"), chat_tokenizer(template), max_prompt=99, max_response=99
        )


def test_a_missing_field_is_named_with_file_and_row():
    rows = [{"prompt": "a", "response": "b"}, {"question": "a", "response": "b"}]
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: no field 'prompt' \(the row has question, response\)"):
        tokenise(rows, Pairs(path="x.jsonl"), text_tokenizer(), max_prompt=8, max_response=8)


def test_files_are_read_whatever_their_form(tmp_path: Path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    plain = write(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert [*read_rows(Pairs(path=str(plain)))] == [*read_rows(Pairs(path=str(zipped)))] == rows
    assert [*read_rows(Pairs(path=str(plain), limit=1))] == rows[:1]
    kept = read_rows(Pairs(path=str(plain), split="train[1:]"))
    assert [*kept] == rows[1:], "what is held back of a data set stays so in a file"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("missing.jsonl", None, "does not exist"), ("empty.jsonl", "", "is empty"), ("data.xyz", "x", "cannot read .xyz")],
)
def test_data_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | None, message: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(Pairs(path=str(tmp_path / name)))
    assert name in str(error.value)


def test_a_document_is_split_into_prompt_and_continuation():
    tokenizer = text_tokenizer()
    whole = "Return the absolute value of the argument, whatever it is."
    (prompt,) = tokenise_documents(
        [{"text": whole}, {"text": "a"}], Documents(path="d", prompt_tokens=4), tokenizer, max_response=64
    )
    assert len(prompt.tokens) == 4
    assert tokenizer.decode([*prompt.tokens, *prompt.response[:-1]]) == whole


def test_plain_text_is_packed_without_losing_or_repeating_a_token():
    tokenizer = text_tokenizer()
    rows = [{"text": "one two three"}, {"text": "four five six seven eight nine ten"}]
    chunks = pack_text(rows, Documents(path="d"), tokenizer, length=4)
    joined = [token for chunk in chunks for token in chunk.tokens + chunk.response]
    eos = tokenizer.eos_token_id
    expected = [token for row in rows for token in [*tokenizer(row["text"])["input_ids"], eos]]
    assert joined == expected[: len(joined)] and 0 <= len(expected) - len(joined) < 4
    assert [chunk.id for chunk in chunks] == [f"d:chunk{number}" for number in range(len(chunks))]
    assert chunks[-1] == chunks[1:][-1] == [*chunks][-1] and chunks[0] not in chunks[1:]
    with pytest.raises(ValueError, match="fewer than one chunk"):
        pack_text(rows, Documents(path="d"), tokenizer, length=1000)


def test_rows_are_tokenised_alike_together_and_alone(monkeypatch: pytest.MonkeyPatch):
    tokenizer = text_tokenizer()
    pairs = [{"prompt": "say " * (1 + index % 5), "response": "date" * (index % 3)} for index in range(20)]
    texts = [{"text": "one two three " * (index % 4)} for index in range(20)]

    def found() -> list[list[Prompt]]:
        prompts = tokenise(pairs, Pairs(path="x"), tokenizer, max_prompt=4, max_response=8)
        documents = tokenise_documents(texts, Documents(path="d", prompt_tokens=2), tokenizer, max_response=8)
        return [[*prompts], [*documents], [*pack_text(texts, Documents(path="d"), tokenizer, length=5)]]

    together = found()
    monkeypatch.setattr("raykd.tokenise.TOGETHER", 1)
    assert found() == together
    assert len({prompt.id for prompt in together[0]}) == len(together[0]) < len(pairs), "long ones are left out"


def test_a_million_rows_fit_the_driver():
    """Four bytes a token and forty a row; what is held out and what is learned from share the tokens."""
    rows = [(row, range(row % 5 + 1), range(row % 3), row % 2 == 0) for row in range(1000)]
    prompts = Prompts.collect("x:", rows)
    assert prompts.tokens.nbytes == 4 * sum(len(prompt) + len(response) for _, prompt, response, _ in rows)
    wanted = [Prompt(id=f"x:{r}", tokens=tuple(p), response=tuple(a), finished=f) for r, p, a, f in rows]
    assert [*prompts] == wanted and prompts[-1] == wanted[-1] and [*prompts[10:20:3]] == wanted[10:20:3]
    order = np.random.default_rng(0).permutation(1000)
    some = prompts[order[:7]]
    assert [*some[2:]] == [wanted[place] for place in order[2:7]] and some.tokens is prompts.tokens
    assert not prompts[:0]
    with pytest.raises(IndexError):
        prompts[1000]


def test_a_stream_shuffles_every_pass_and_resumes_from_two_integers():
    stream = PromptStream(list(range(10)), seed=3)
    first, second = stream.take(10), stream.take(10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    stream.take(4)
    resumed = PromptStream(list(range(10)), seed=3)
    resumed.restore(stream.state())
    assert resumed.take(25) == stream.take(25)
