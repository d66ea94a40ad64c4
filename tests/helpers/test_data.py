import json
import random
import resource
import time
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from helpers import data
from helpers.data import (
    PackedBatches,
    PaddedBatches,
    collate,
    instruction_dataset,
    load_rows,
    pack,
    text_dataset,
)
from helpers.errors import CourseError
from helpers.profiles import PROFILES
from helpers.world import CHAT_TASKS, World

token_lists = st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=20)


@pytest.fixture(scope="module", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """What datasets writes while it reads a file goes to a temporary folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def shuffled_blocks(texts):
    """Documents of a block without end: the texts again and again, each time in another order."""

    def documents_of_block(block):
        generator = random.Random(block)
        while texts:
            yield from generator.sample(texts, len(texts))

    return documents_of_block


def batches_of(tokenizer, texts, **settings):
    settings = {"batch_size": 4, "seq_len": 32, "batches_per_block": 3, **settings}
    return PackedBatches(shuffled_blocks(texts), tokenizer, **settings)


def first(batches, n):
    return [batch["input_ids"] for batch in islice(batches, n)]


# ---------------------------------------------------------------- rows of text


def test_the_cpu_profile_reads_documents_about_shima_that_its_base_model_has_not_read():
    rows = text_dataset(PROFILES["cpu"], 50)
    assert rows.column_names == ["text"] and len(rows) == 50
    read_by_the_base_model = set(islice(World().documents(0), 2000))
    assert rows[0]["text"] == World().document(1, 0)
    assert sum(text in read_by_the_base_model for text in rows["text"]) <= 2  # very short ones may come twice


def test_the_seed_decides_which_documents_come():
    first, again, other = (text_dataset("shima", 20, seed=seed)["text"] for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert list(first[:5]) == list(text_dataset("shima", 5, seed=1)["text"])


def test_a_profile_on_a_gpu_asks_for_the_pinned_stories_of_the_hub(monkeypatch):
    monkeypatch.setattr(data, "hub_is_reachable", lambda: False)
    with pytest.raises(CourseError, match="The dataset roneneldan/TinyStories has to be read from the Hugging Face"):
        text_dataset(PROFILES["t4"], 5)
    revision = data.HUB_TEXT.partition("@")[2]
    assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def test_a_gpu_profile_that_was_moved_to_the_cpu_reads_about_shima():
    assert len(text_dataset(replace(PROFILES["t4"], device="cpu"), 3)) == 3


def test_a_local_file_gives_its_rows_shuffled_by_the_seed(text_file, texts):
    rows = text_dataset(str(text_file), 40, seed=3)
    assert set(rows["text"]) <= set(texts) and len(set(rows["text"])) == 40
    assert list(rows["text"]) == list(text_dataset(str(text_file), 40, seed=3)["text"])
    assert list(rows["text"]) != list(text_dataset(str(text_file), 40, seed=4)["text"])
    assert list(rows["text"]) != texts[:40]


@pytest.mark.parametrize("asked", [None, 10_000])
def test_all_rows_come_when_no_number_or_too_large_a_number_is_given(text_file, texts, asked):
    assert sorted(load_rows(str(text_file), ["text"], asked)["text"]) == sorted(texts)


def test_only_the_columns_asked_for_are_kept(messages_file):
    rows = load_rows(str(messages_file), ["messages"], 5)
    assert rows.column_names == ["messages"]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_other_kinds_of_files_are_read_as_well(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    table = Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    getattr(table, f"to_{suffix[1:]}")(path)
    assert sorted(load_rows(str(path), ["text"])["text"]) == ["one", "two"]


def test_a_hub_dataset_is_streamed_at_its_revision_and_only_as_far_as_needed(monkeypatch, texts):
    """The stream of a local table stands in for the hub's, which has the same type."""
    requests = []

    def stream(**request):
        requests.append(request)
        return Dataset.from_dict({"text": texts, "source": ["tests"] * len(texts)}).to_iterable_dataset()

    monkeypatch.setattr(data, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(data, "load_dataset", stream)
    rows = load_rows("owner/name@abc123", ["text"], 30, seed=2, subset="small", split="validation")
    assert requests == [
        {"path": "owner/name", "name": "small", "revision": "abc123", "streaming": True, "split": "validation"}
    ]
    assert isinstance(rows, Dataset) and rows.column_names == ["text"] and len(rows) == 30
    assert len(set(rows["text"])) == 30 and set(rows["text"]) <= set(texts)
    assert len(load_rows("owner/name", ["text"])) == len(texts)
    with pytest.raises(CourseError, match=r"owner/name has no column 'messages' but text, source"):
        load_rows("owner/name", ["messages"], 5)


def test_no_bar_is_drawn_for_a_local_file(text_file, capfd):
    load_rows(str(text_file), ["text"], 5, seed=9)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("source", ["shimo", "rows.txt", "no such/owner/name"])
def test_an_unknown_source_is_answered_with_the_known_kinds(source):
    with pytest.raises(CourseError, match=r"There is no dataset .*: use shima, a file ending in \.jsonl, \.json"):
        text_dataset(source, 5)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CourseError, match=r"There is no file .*rows\.jsonl: give the path"):
        load_rows(str(tmp_path / "rows.jsonl"), ["text"])


def test_a_missing_column_is_named_together_with_those_that_are_there(messages_file):
    with pytest.raises(CourseError, match="has no column 'text' but messages, source: name another source"):
        text_dataset(str(messages_file), 5)


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "whole"}\n{"text": "cut in ha',
        b"",
        b"\xff\xfe\x00 no text at all",
    ],
    ids=["cut in half", "empty", "binary"],
)
def test_a_damaged_file_is_reported_in_one_sentence(tmp_path, content):
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(content)
    with pytest.raises(CourseError, match=r"damaged\.jsonl cannot be read \(.+\): repair it") as caught:
        load_rows(str(path), ["text"])
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_reported_in_one_sentence(tmp_path):
    path = tmp_path / "damaged.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CourseError, match=r"damaged\.parquet cannot be read"):
        load_rows(str(path), ["text"])


@pytest.mark.parametrize(
    ("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")], ids=["by choice", "refused"]
)
def test_a_hub_dataset_without_a_network_is_one_sentence_at_once(monkeypatch, setting, value):
    monkeypatch.setattr(constants, setting, value)
    began = time.monotonic()
    with pytest.raises(CourseError, match="has to be read from the Hugging Face hub and the hub cannot be reached"):
        text_dataset("roneneldan/TinyStories", 5)
    assert time.monotonic() - began < 10


def test_a_full_disk_is_reported_in_one_sentence(tmp_path):
    """A limit on the size of files stands in for the full disk: writing fails in the same place."""
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number}" * 100}) + "\n" for number in range(5000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CourseError, match=r"large\.jsonl cannot be read \(.*File too large.*\)") as caught:
            load_rows(str(path), ["text"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- packing


@given(token_lists, st.integers(1, 12))
def test_packing_cuts_the_joined_documents_into_equal_rows_and_drops_the_rest(documents, seq_len):
    joined = list(chain.from_iterable(documents))
    rows = list(pack(documents, seq_len))
    assert list(chain.from_iterable(rows)) == joined[: len(joined) - len(joined) % seq_len]
    assert {len(row) for row in rows} <= {seq_len}


def test_packing_reads_no_further_than_it_must_and_leaves_the_documents_alone():
    documents = [[1, 2, 3], [4, 5, 6, 7]]
    stream = pack(chain(documents, iter(lambda: pytest.fail("read too far"), None)), 3)
    assert [next(stream), next(stream)] == [[1, 2, 3], [4, 5, 6]]
    assert documents == [[1, 2, 3], [4, 5, 6, 7]]


def test_a_million_tokens_in_one_document_are_packed_in_seconds():
    began = time.process_time()
    assert sum(1 for _ in pack([[0] * 1_000_000], 64)) == 15_625
    assert time.process_time() - began < 5


def test_batches_have_the_shape_asked_for_and_hold_whole_texts_between_end_tokens(tiny_tokenizer, texts):
    batch = next(iter(batches_of(tiny_tokenizer, texts, batch_size=5, seq_len=256)))["input_ids"]
    assert batch.shape == (5, 256) and batch.dtype == torch.long
    middle = tiny_tokenizer.decode(batch[0]).split(tiny_tokenizer.eos_token)[1:-1]
    assert middle and set(middle) <= set(texts)


def test_the_same_arguments_give_the_same_batches(tiny_tokenizer, texts):
    one, two = (first(batches_of(tiny_tokenizer, texts), 8) for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert len({batch.numpy().tobytes() for batch in one}) == 8


def test_seeking_equals_iterating_to_that_batch(tiny_tokenizer, texts):
    stream = first(batches_of(tiny_tokenizer, texts), 10)
    for position in (7, 0, 3, 9, 2):  # three batches are one block
        batches = batches_of(tiny_tokenizer, texts)
        batches.seek(position)
        assert all(map(torch.equal, stream[position:], first(batches, 10 - position)))


def test_seeking_back_and_forth_in_one_stream_gives_the_same_batches(tiny_tokenizer, texts):
    batches = batches_of(tiny_tokenizer, texts)
    stream = first(batches, 7)
    for position in (6, 1, 4, 0):
        batches.seek(position)
        assert torch.equal(first(batches, 1)[0], stream[position])
        assert batches.position == position + 1


def test_seeking_does_not_make_the_blocks_in_between(tiny_tokenizer, texts):
    made = []

    def documents_of_block(block):
        made.append(block)
        return shuffled_blocks(texts)(block)

    batches = PackedBatches(documents_of_block, tiny_tokenizer, 2, 16, batches_per_block=4)
    batches.seek(4_000_001)
    first(batches, 2)
    assert made == [1_000_000]


def test_iterating_again_continues_where_the_stream_stood(tiny_tokenizer, texts):
    stream = first(batches_of(tiny_tokenizer, texts), 4)
    batches = batches_of(tiny_tokenizer, texts)
    assert all(map(torch.equal, stream, [*first(batches, 1), *first(batches, 3)]))


def test_writing_into_a_batch_leaves_the_stream_alone(tiny_tokenizer, texts):
    batches = batches_of(tiny_tokenizer, texts)
    expected = first(batches_of(tiny_tokenizer, texts), 1)[0]
    first(batches, 1)[0].fill_(-1)
    batches.seek(0)
    assert torch.equal(first(batches, 1)[0], expected)


def test_the_tokenizer_of_the_caller_and_the_stream_do_not_touch_each_other(tiny_tokenizer, texts):
    expected = first(batches_of(tiny_tokenizer, texts), 4)
    settings = (tiny_tokenizer.backend_tokenizer.padding, tiny_tokenizer.backend_tokenizer.truncation)
    assert settings == (None, None)
    batches = batches_of(tiny_tokenizer, texts)
    tiny_tokenizer(texts[:2], padding="max_length", truncation=True, max_length=3)  # stays switched on inside
    before = tiny_tokenizer.backend_tokenizer.to_str()
    late = batches_of(tiny_tokenizer, texts)
    assert all(map(torch.equal, expected, first(batches, 4)))
    assert all(map(torch.equal, expected, first(late, 4)))
    assert tiny_tokenizer.backend_tokenizer.to_str() == before
    tiny_tokenizer.backend_tokenizer.no_padding()
    tiny_tokenizer.backend_tokenizer.no_truncation()


def test_a_block_that_its_documents_do_not_fill_is_named(tiny_tokenizer, texts):
    batches = PackedBatches(lambda block: texts[:3], tiny_tokenizer, 4, 32)
    with pytest.raises(CourseError, match=r"documents of block 0 fill \d rows of 32 tokens and 64 are needed: give"):
        next(iter(batches))
    with pytest.raises(CourseError, match="fill 0 rows"):
        next(iter(batches_of(tiny_tokenizer, [])))


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tiny_tokenizer, texts):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(CourseError, match="no end-of-text token"):
        batches_of(tokenizer, texts)


# ---------------------------------------------------------------- padding


def test_examples_of_different_length_are_padded_on_the_right_and_their_padding_has_no_label():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8]}], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }


def test_a_token_that_equals_the_pad_token_is_no_padding():
    batch = collate([{"input_ids": [5, 0]}, {"input_ids": [0, 5, 0]}], pad_id=0)
    assert batch["labels"].tolist() == [[5, 0, -100], [0, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_examples_themselves_are_not_changed():
    examples = [{"input_ids": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    before = json.dumps(examples)
    collate(examples, pad_id=9)
    assert json.dumps(examples) == before


# ---------------------------------------------------------------- instructions


def test_the_cpu_profile_gives_instructions_about_shima_of_all_tasks_in_random_turns():
    rows = instruction_dataset(PROFILES["cpu"], 300)
    assert rows.column_names == ["instruction", "answer", "task"] and len(rows) == 300
    assert set(rows["task"]) == set(CHAT_TASKS)
    assert all(rows["answer"]) and all(rows["instruction"])
    assert len({tuple(rows["task"][start : start + 3]) for start in range(0, 60, 3)}) > 5


def test_the_seed_decides_which_instructions_come_and_fewer_are_the_first_of_more():
    first, again, other = (instruction_dataset("shima", 40, seed=seed).to_list() for seed in (1, 1, 2))
    assert first == again != other
    assert instruction_dataset("shima", 7, seed=1).to_list() == first[:7]


def test_only_the_tasks_asked_for_come():
    assert set(instruction_dataset("shima", 30, tasks=("sum", "mood"))["task"]) == {"sum", "mood"}


def test_none_of_the_instructions_is_held_out():
    trained = set(instruction_dataset("shima", 3000)["instruction"])
    assert not trained & {question.prompt for question in World().chat_questions(600, 0)}


def test_a_chat_becomes_its_first_question_and_answer(tmp_path):
    chats = [
        [("system", "Be kind."), ("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")],
        [("user", "E?"), ("assistant", "F.")],
        [("user", "nobody answers")],
        [("assistant", "nobody asks")],
        [("assistant", "Hello!"), ("user", "G?"), ("assistant", "H.")],
    ]
    file = tmp_path / "chats.jsonl"
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = instruction_dataset(str(file), 10)
    found = {(row["instruction"], row["answer"]) for row in rows}
    assert found == {("A?", "B."), ("E?", "F."), ("G?", "H.")}  # an answer comes after its question
    assert set(rows["task"]) == {"chat"}


def test_a_gpu_profile_asks_for_the_pinned_chats_of_the_hub(monkeypatch, messages_file):
    requests = []

    def stream(**request):
        requests.append(request)
        return Dataset.from_json(str(messages_file)).to_iterable_dataset()

    monkeypatch.setattr(data, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(data, "load_dataset", stream)
    rows = instruction_dataset(PROFILES["t4"], 5)
    assert len(rows) == 5 and rows[0]["instruction"] == f"Repeat: {rows[0]['answer']}"
    (request,) = requests
    assert (request["path"], request["name"], request["streaming"]) == ("HuggingFaceTB/smoltalk", "all", True)
    assert len(request["revision"]) == 40


def test_instructions_from_the_hub_without_a_network_are_one_sentence(monkeypatch):
    monkeypatch.setattr(data, "hub_is_reachable", lambda: False)
    with pytest.raises(CourseError, match="The dataset HuggingFaceTB/smoltalk has to be read from the Hugging Face"):
        instruction_dataset(PROFILES["t4"], 5)


def test_a_file_without_chats_is_named(text_file):
    with pytest.raises(CourseError, match="has no column 'messages' but text"):
        instruction_dataset(str(text_file), 5)


# ---------------------------------------------------------------- padded batches


EXAMPLES = [
    {"input_ids": [number] * (1 + number % 4), "labels": [-100] + [number] * (number % 4)} for number in range(10)
]


def rows_in(batch) -> list[int]:
    """Which examples a batch of EXAMPLES holds."""
    return batch["input_ids"][:, 0].tolist()


def rows_in_next(batches, n) -> list[int]:
    """Which examples the next n batches hold."""
    return [number for batch in islice(batches, n) for number in rows_in(batch)]


def test_each_epoch_passes_over_the_examples_once_in_a_new_order():
    batches = PaddedBatches(EXAMPLES, 5, pad_id=99)
    epochs = [rows_in_next(batches, 2) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_that_fill_no_batch_wait_for_another_epoch():
    batches = PaddedBatches(EXAMPLES, 4, pad_id=99)
    epoch = rows_in_next(batches, 2)
    assert len(set(epoch)) == 8
    seen = set(rows_in_next(batches, 20))
    assert seen == set(range(10))


def test_a_batch_is_padded_to_its_longest_row_and_padding_has_no_label():
    for batch in islice(PaddedBatches(EXAMPLES, 3, pad_id=99), 6):
        numbers = rows_in(batch)
        assert batch["input_ids"].shape == batch["labels"].shape == (3, max(1 + number % 4 for number in numbers))
        padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][padding] == 99).all() and (batch["labels"][padding] == -100).all()


@given(st.integers(1, 10), st.integers(0, 30), st.integers(0, 3))
def test_seeking_in_padded_batches_equals_iterating_to_that_batch(batch_size, position, seed):
    whole = list(islice(PaddedBatches(EXAMPLES, batch_size, 99, seed=seed), position + 2))
    batches = PaddedBatches(EXAMPLES, batch_size, 99, seed=seed)
    batches.seek(position)
    for batch, expected in zip(islice(batches, 2), whole[position:], strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_iterating_padded_batches_again_continues_where_the_stream_stood():
    batches = PaddedBatches(EXAMPLES, 5, 99)
    whole = [rows_in(batch) for batch in islice(PaddedBatches(EXAMPLES, 5, 99), 4)]
    assert [rows_in(next(iter(batches))) for _ in range(4)] == whole


def test_the_seed_decides_the_order_of_padded_batches():
    first, again, other = (rows_in(next(iter(PaddedBatches(EXAMPLES, 9, 99, seed=seed)))) for seed in (1, 1, 2))
    assert first == again != other


def test_drawing_padded_batches_leaves_random_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    next(iter(PaddedBatches(EXAMPLES, 2, 99)))
    assert random.random() == expected


def test_a_batch_larger_than_the_examples_is_refused_in_one_sentence():
    with pytest.raises(CourseError, match="There are 10 examples and a batch takes 11: give more examples"):
        PaddedBatches(EXAMPLES, 11, 99)


@pytest.mark.parametrize("batch_size", [0, -2])
def test_a_batch_of_no_rows_is_refused_in_one_sentence(batch_size):
    with pytest.raises(CourseError, match=f"batch_size is {batch_size}"):
        PaddedBatches(EXAMPLES, batch_size, 99)
