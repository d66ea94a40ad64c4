"""The chat format: its parts fit together, and only what the assistant says has a label."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import apply_chat_template

from helpers.chat import chat_prompt, chat_text, encode_chat, end_of_turn
from helpers.data import collate
from helpers.errors import CourseError
from helpers.models import load_model, load_tokenizer
from helpers.profiles import get_profile
from helpers.training import causal_lm_loss

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # those of hub models, as trl ships them
CHATML = (  # as Qwen2 writes it, without its default system message; {% generation %} is left out there as well
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, template):
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def shima():
    return load_tokenizer("shima-4m")


@pytest.fixture(scope="module", params=[CHATML, MARKED_CHATML], ids=["chatml", "marked chatml"])
def chatml(request, tiny_tokenizer):
    return with_template(tiny_tokenizer, request.param)


def learned_tokens(example):
    return [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]


def assistant_tokens(tokenizer, instruction, answer):
    """Ids of the whole chat, and of what the template's own mask says is the assistant's."""
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return encoded["input_ids"], [token for token, said in pairs if said]


def test_the_text_begins_with_the_prompt_and_goes_on_with_answer_and_end_of_turn(shima):
    prompt, text = chat_prompt(shima, "Where is Kela?"), chat_text(shima, "Where is Kela?", "In the north.")
    assert prompt == "<|user|>\nWhere is Kela?<|end|>\n<|assistant|>\n"
    assert text == prompt + "In the north.<|end|>\n"
    assert end_of_turn(shima) == "<|end|>"


def test_a_chatml_tokenizer_is_written_in_its_own_marks(chatml):
    assert chat_prompt(chatml, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert end_of_turn(chatml) == "<|im_end|>"
    example = encode_chat(chatml, "Ada is a baker.", "Bela is a smith.")
    assert chatml.decode(example["input_ids"]) == chat_text(chatml, "Ada is a baker.", "Bela is a smith.")
    assert chatml.decode(learned_tokens(example)) == "Bela is a smith.<|im_end|>\n"


def test_a_model_that_can_think_answers_at_once(tiny_tokenizer, tmp_path):
    """Qwen3's own template: the empty thought is part of the prompt, for trl as for the course."""
    with_template(tiny_tokenizer, (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(str(tmp_path))
    begun = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat_prompt(tokenizer, "Hi") == begun
    assert tokenizer.decode(learned_tokens(encode_chat(tokenizer, "Hi", "Ho."))) == "Ho.<|im_end|>\n"
    asked = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho."}]}
    assert apply_chat_template(asked, tokenizer) == {"prompt": begun, "completion": "Ho.<|im_end|>\n"}
    tokenizer.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text('{"model_type": "llama"}')
    assert chat_prompt(load_tokenizer(str(tmp_path / "again")), "Hi") == begun


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<|>"), min_size=1, max_size=40).map(
    lambda text: text.strip() or "x"
)


@settings(max_examples=60)
@given(instruction=TEXTS, answer=TEXTS)
def test_the_labels_are_the_templates_own_assistant_mask(shima, instruction, answer):
    example = encode_chat(shima, instruction, answer)
    ids, said = assistant_tokens(shima, instruction, answer)
    assert example["input_ids"] == ids
    assert learned_tokens(example) == said
    assert len(example["labels"]) == len(example["input_ids"])


def test_the_labels_are_the_mask_of_a_marked_chatml_template(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, MARKED_CHATML)
    for instruction, answer in (("Ada?", "A baker."), ("Two\nlines.", "1 2 3"), ("Grüße", "島 🙂")):
        example = encode_chat(tokenizer, instruction, answer)
        assert (example["input_ids"], learned_tokens(example)) == assistant_tokens(tokenizer, instruction, answer)


def test_a_label_is_the_token_at_its_own_place(shima):
    example = encode_chat(shima, "Add 1 + 2.", "3.")
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
    assert example["labels"][-1] == example["input_ids"][-1] != -100  # the end of the turn is learned


def test_an_answer_that_repeats_the_instruction_is_still_told_from_it(shima):
    instruction = "Say: <|assistant|>\nyes"
    example = encode_chat(shima, instruction, instruction)
    assert shima.decode(learned_tokens(example)) == instruction + "<|end|>\n"


def test_an_empty_answer_still_learns_to_end_its_turn(shima):
    assert shima.decode(learned_tokens(encode_chat(shima, "Be silent.", ""))) == "<|end|>\n"


def test_the_user_has_no_influence_on_which_tokens_are_counted(shima):
    model, tokenizer = load_model(get_profile("cpu"))
    example = encode_chat(tokenizer, "Where is Kela?", "North.")
    batch = collate([example], tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[0].log_softmax(-1)
        expected = [-logits[place - 1, label].item() for place, label in enumerate(example["labels"]) if label != -100]
        assert causal_lm_loss(model, batch).item() == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_tokenizer_without_a_template_is_refused_in_one_sentence(tiny_tokenizer):
    assert tiny_tokenizer.chat_template is None
    for call in (
        lambda: chat_prompt(tiny_tokenizer, "Hi"),
        lambda: chat_text(tiny_tokenizer, "Hi", "Ho"),
        lambda: end_of_turn(tiny_tokenizer),
        lambda: encode_chat(tiny_tokenizer, "Hi", "Ho"),
    ):
        with pytest.raises(CourseError, match="has no chat template: use the tokenizer of a chat model"):
            call()


def test_a_template_that_hides_or_moves_the_prompt_is_refused(tiny_tokenizer):
    """Some templates write something between the mark and the answer only while generating, such as a thought."""
    thinking = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(CourseError, match="does not begin with its prompt"):
        encode_chat(with_template(tiny_tokenizer, thinking), "Hi", "Ho")


def test_the_end_of_a_turn_is_found_where_the_template_writes_a_space_before_the_answer(tiny_tokenizer):
    spaced = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    )
    assert end_of_turn(with_template(tiny_tokenizer, spaced)) == "</s>"
