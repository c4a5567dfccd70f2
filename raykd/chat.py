"""Conversations as text: what the chat template of a tokenizer makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from raykd.value import Value

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``."""


class Chat(Value):
    """A conversation is laid out by the chat template of the student's tokenizer."""

    system: str | None = None
    """System message of conversations that do not begin with one."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """What the template is told besides, for instance ``{"enable_thinking": False}``."""

    def lay_out(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str | None
    ) -> tuple[str, str | None]:
        """The prompt, up to where the assistant's answer begins, and the answer with what the template puts around it.

        Raises ValueError where there is no template, or where it does not take such a conversation.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path} has no chat template; take an instruction-tuned student, or data "
                "without chat"
            )
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        prompt = self._text(tokenizer, messages, add_generation_prompt=True)
        if answer is None:
            return prompt, None
        whole = self._text(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        return prompt, whole.removeprefix(prompt) if whole.startswith(prompt) else answer

    def _text(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        options: dict[str, Any] = self.options | {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except TemplateError as error:
            raise ValueError(f"the chat template of tokenizer {tokenizer.name_or_path} refuses it: {error}") from error
        assert isinstance(text, str)
        return text
