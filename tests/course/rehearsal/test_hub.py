"""The stand-in of a hub model: its tokenizer has the ids and the chat format of the real one."""

from pathlib import Path

import trl

from course.rehearsal.hub import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from helpers.chat import chat_prompt, encode_chat
from helpers.models import THINKING_OFF

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def test_the_stand_in_has_the_ids_and_the_chat_format_of_qwen3():
    tokenizer = build_tokenizer(151_936)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 151_643
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool_call>", "<|file_sep|>", "</think>"]) == [
        *(151_645, 151_657, 151_664, 151_668)
    ]
    assert len(tokenizer) == 151_643 + len(SPECIAL)
    for prefix in ("", THINKING_OFF):
        said = []
        for template in (CHAT_TEMPLATE, QWEN3):
            tokenizer.chat_template = prefix + template
            said.append((chat_prompt(tokenizer, "Where?"), encode_chat(tokenizer, "Where?", "In the north.")))
        assert said[0] == said[1]
