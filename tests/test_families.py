"""The learner and a teacher's head beside transformers' own code, family by family; ``benchmarks/families.py`` does so with
vLLM's engines."""

from pathlib import Path

import pytest
import torch
from families import EOS, FAMILIES, VOCABULARY, eager, given_texts, logprobs, save_model

from raykd.student import Student
from raykd.teacher.heads import head_in_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_students_log_probs_are_those_of_its_familys_own_code(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    own = eager(tmp_path)
    student = Student(
        str(tmp_path), dtype=torch.float32, vocab_size=VOCABULARY, chunk=None, teacher_head=None, activation_checkpointing=False
    )
    texts = given_texts()
    layout = student.lay([text.prompt_tokens for text in texts], [text.tokens for text in texts])
    with torch.no_grad():
        states = layout.states(student.model.base_model)
        for text, at in zip(texts, layout.predictors, strict=True):
            found = student.output.head()(states[at])[:, :VOCABULARY].log_softmax(-1)
            chosen = found.gather(-1, torch.tensor(text.tokens)[:, None])[text.first_predicted :, 0]
            torch.testing.assert_close(chosen, torch.tensor(logprobs(own, text))[text.first_predicted :], atol=1e-3, rtol=0)
            assert EOS not in text.tokens and float(chosen.std() if len(chosen) > 1 else 1) > 0.3, "far from flat"
    found = head_in_checkpoint(str(tmp_path), torch.float32)
    assert torch.equal(found.weight, own.get_output_embeddings().weight)
