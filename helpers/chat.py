"""The chat format of a tokenizer: what a chat looks like as text and as tokens, and which of them are learned from.

It knows no model and no task. The format itself is the tokenizer's chat template.
"""

from transformers import PreTrainedTokenizerBase

from helpers.errors import CourseError


def chat_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    """The instruction as a user's turn, up to the point where the assistant's answer begins.

    Raises CourseError for a tokenizer without a chat template.
    """
    return _render(tokenizer, [{"role": "user", "content": instruction}], add_generation_prompt=True)


def chat_text(tokenizer: PreTrainedTokenizerBase, instruction: str, answer: str) -> str:
    """The instruction and its answer, as far as the end of the assistant's turn.

    Raises CourseError for a tokenizer without a chat template.
    """
    return _render(tokenizer, [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the format writes after an answer, such as "<|end|>" or "<|im_end|>"."""
    return _answer_part(tokenizer, "?", "!").partition("!")[2].strip()


def encode_chat(tokenizer: PreTrainedTokenizerBase, instruction: str, answer: str) -> dict[str, list[int]]:
    """One chat as "input_ids" and "labels", both (seq,); the labels of all that the user says are -100.

    So the loss is taken over the answer and the end of the turn only. Raises CourseError for a tokenizer without a
    chat template, and for a template in which a chat does not begin with its prompt.
    """
    return encode_answer(tokenizer, chat_prompt(tokenizer, instruction), _answer_part(tokenizer, instruction, answer))


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> dict[str, list[int]]:
    """Any prompt and the text that is to follow it as "input_ids" and "labels", both (seq,); -100 in the prompt."""
    asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}


def _answer_part(tokenizer: PreTrainedTokenizerBase, instruction: str, answer: str) -> str:
    prompt, text = chat_prompt(tokenizer, instruction), chat_text(tokenizer, instruction, answer)
    if not text.startswith(prompt):
        raise CourseError(
            "With this tokenizer's chat template a chat does not begin with its prompt, so its answer cannot be told "
            "apart: set a template whose generation prompt is only what stands before an answer."
        )
    return text.removeprefix(prompt)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **settings) -> str:
    if tokenizer.chat_template is None:
        raise CourseError(
            "The tokenizer has no chat template: use the tokenizer of a chat model, or set its chat_template."
        )
    return tokenizer.apply_chat_template(turns, tokenize=False, **settings)
