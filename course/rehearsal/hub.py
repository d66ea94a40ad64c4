"""Stands in for the hub where there is none: a profile's model with its true architecture and random weights, and rows
in the schemas of its datasets. What is made stays in the folder, so that it is made once.

The tokenizer has the true special tokens, their ids and the size of the vocabulary. Its merges are learned from English
prose of the course, some 8,000 against Qwen's 151,387: a text has a little more tokens than with the real one, which
for memory is the safe side. Tokens that nothing merges to fill the vocabulary up.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from course.notebooks import read_notebook, select_notebooks
from helpers.errors import CourseError
from helpers.files import replacing_folder, sha256, write_atomically
from helpers.profiles import ROOT, Profile
from helpers.world import World

SHAPES = ROOT / "data" / "model_shapes.json"
MERGES = 8_000
# Qwen2's way to cut a text before merging, and its special tokens in the order of their ids.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
FIRST_SPECIAL = 151_643
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2.5's template as far as there are no tools in the chat.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def model_folder(profile: Profile, folder: Path) -> Path:
    """The profile's model in hub format, below `folder`.

    CourseError where its shape is not known or the disk is full.
    """
    shape = json.loads(SHAPES.read_text(encoding="utf-8"))["models"].get(profile.model_id)
    if shape is None or shape["model_type"] not in ("qwen2", "qwen3"):
        raise CourseError(
            f"A rehearsal knows no tokenizer and shape of {profile.model_id}: enter its shape in {SHAPES.name} and its "
            "special tokens in course/rehearsal/hub.py."
        )
    shape = {name: value for name, value in shape.items() if name != "source"}
    place = folder / profile.model_id.replace("/", "--")
    made_of = shape | {"made by": sha256(Path(__file__))}
    if (place / "shape.json").is_file() and json.loads((place / "shape.json").read_text()) == made_of:
        return place
    config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=FIRST_SPECIAL, pad_token_id=FIRST_SPECIAL)
    return build(place, lambda made: _write_model(config, made_of, made))


def build(place: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill the folder; it is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing_folder(place) as made:
            write(made)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as the latter
        free = shutil.disk_usage(place.parent).free / 1e9
        raise CourseError(
            f"{place} could not be written ({str(error).splitlines()[0]}; {free:.1f} GB are free): make room, or use "
            "--out on another disk."
        ) from None
    return place


def _write_model(config, made_of: dict, folder: Path) -> None:
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    build_tokenizer(config.vocab_size).save_pretrained(folder)
    write_atomically(folder / "shape.json", json.dumps(made_of))


def build_tokenizer(vocab_size: int, first_special: int = FIRST_SPECIAL) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens begin at that id; ids beyond them belong to no token, as in the real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=min(MERGES, first_special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_prose(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = learned["vocab"] | {f"Ġ{_word(n)}": n for n in range(len(learned["vocab"]), first_special)}
    # with ignore_merges a made-up word is one token again when its text is read
    tokenizer.model = models.BPE(vocabulary, [tuple(pair) for pair in learned["merges"]], ignore_merges=True)
    end, *others = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, extra_special_tokens=others
    )
    fast.model_max_length = 32_768
    fast.chat_template = CHAT_TEMPLATE
    if len(fast) > vocab_size:
        raise CourseError(f"The vocabulary of {vocab_size} has no room for tokens up to {len(fast)}: mend the shape.")
    return fast


def _word(number: int) -> str:
    """A word of consonants, another one for each number."""
    consonants, word = "bcdfghjklmnpqrstvwxz", "zq"
    while number:
        number, rest = divmod(number, len(consonants))
        word += consonants[rest]
    return word


def _prose() -> Iterator[str]:
    for path in select_notebooks():
        yield from (cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Files in the schemas of the profiles' stories and chats, about as long as those are."""
    stories, chats = folder / "stories.jsonl", folder / "chats.jsonl"
    if not (stories.is_file() and chats.is_file()):
        documents, draw = World().documents(1), random.Random(0)

        def text(words: float) -> str:
            """Documents of at least so many words together."""
            parts: list[str] = []
            while sum(len(part.split()) for part in parts) < words:
                parts.append(next(documents))
            return "\n".join(parts)

        def words(median: float, spread: float) -> float:
            return draw.lognormvariate(math.log(median), spread)

        folder.mkdir(parents=True, exist_ok=True)
        told = [{"text": text(words(160, 0.4))} for _ in range(4_000)]
        said = [
            {
                "messages": [
                    {"role": "user", "content": text(words(40, 1.0))},
                    {"role": "assistant", "content": text(words(150, 0.9))},
                ],
                "source": "rehearsal",
            }
            for _ in range(4_000)
        ]
        write_atomically(stories, "".join(json.dumps(row) + "\n" for row in told))
        write_atomically(chats, "".join(json.dumps(row) + "\n" for row in said))
    return stories, chats
