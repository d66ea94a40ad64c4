"""Text for training: documents from Shima, from a local file or from the hub, packed rows and padded batches.

Everything is a function of its seeds: the same arguments give the same rows in the same order on every machine.
Lessons build their own preferences out of the rows; the only prompt format here is the tokenizer's chat format.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from helpers.errors import CourseError
from helpers.hub import HUB_ID, hub_is_reachable
from helpers.profiles import Profile
from helpers.world import CHAT_TASKS, World

# Short stories in simple English (Eldan and Li 2023, arXiv:2305.07759), at a pinned revision.
HUB_TEXT = "roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
# Chats written by language models and filtered (Allal et al. 2025, arXiv:2502.02737).
HUB_CHATS = "HuggingFaceTB/smoltalk@4c8b6d9a7d43209176160d6e60732f7806f6f543"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def text_dataset(profile_or_source: Profile | str, num_documents: int, *, seed: int = 0) -> Dataset:
    """Documents to train on, one per row, in the column "text".

    On the CPU profile they are about Shima, on a GPU profile they are the stories of `HUB_TEXT`. A source may also be
    named: "shima", a local file, or a hub dataset "owner/name@revision" that has a column "text".
    `seed` decides which documents come, and in which order; shima-4m has read none of those about Shima.
    Raises CourseError as `load_rows` does.
    """
    source = profile_or_source
    if isinstance(source, Profile):
        source = "shima" if source.device == "cpu" else HUB_TEXT
    if source == "shima":
        stream = World().documents(seed + 1)  # stream 0 made shima-4m
        return Dataset.from_dict({"text": list(islice(stream, num_documents))})
    return load_rows(source, ["text"], num_documents, seed=seed)


def instruction_dataset(
    profile_or_source: Profile | str, num_rows: int, *, seed: int = 0, tasks: Sequence[str] = CHAT_TASKS
) -> Dataset:
    """Instructions with their right answers, in the columns "instruction", "answer" and "task".

    On the CPU profile they are about Shima, of the given `tasks` in random turns; on a GPU profile they are the first
    user's turns of the chats of `HUB_CHATS` that are answered. A source may also be named: "shima", a local file, or a
    hub dataset that has a column "messages"; its task is then "chat". Raises CourseError as `load_rows` does.
    """
    source = profile_or_source
    if isinstance(source, Profile):
        source = "shima" if source.device == "cpu" else HUB_CHATS
    if source == "shima":
        questions = World().training_chats(num_rows, seed, tasks)
        rows = [{"instruction": q.prompt, "answer": q.answer, "task": q.ability.split("/")[1]} for q in questions]
        return Dataset.from_list(rows)
    chats = load_rows(source, ["messages"], num_rows, seed=seed, subset="all" if source == HUB_CHATS else None)
    rows = []
    for chat in chats["messages"]:
        for question, reply in pairwise(chat):
            if (question["role"], reply["role"]) == ("user", "assistant"):
                rows.append({"instruction": question["content"], "answer": reply["content"], "task": "chat"})
                break
    return Dataset.from_list(rows)


def load_rows(
    source: str,
    columns: Sequence[str],
    num_rows: int | None = None,
    *,
    seed: int = 0,
    split: str = "train",
    subset: str | None = None,
) -> Dataset:
    """Rows of a local .jsonl, .json, .parquet or .csv file, or of a hub dataset "owner/name@revision", shuffled.

    Keeps `columns`, and the first `num_rows` after shuffling. A hub dataset is read as a stream, so that a few
    thousand rows of a large one come quickly; its shuffling is then one of shards and of a window of 10,000 rows.
    Raises CourseError where the source is unknown, unreachable or damaged, or lacks a column.
    """
    path, (name, _, revision) = Path(source), source.partition("@")
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise CourseError(f"There is no file {source}: give the path of an existing one.")
        request = {"path": FILE_FORMATS[path.suffix], "data_files": str(path)}
    elif HUB_ID.fullmatch(name):
        if not hub_is_reachable():
            raise CourseError(
                f"The dataset {name} has to be read from the Hugging Face hub and the hub cannot be reached: "
                "connect to the network (and unset HF_HUB_OFFLINE), or use the profile cpu, which needs none."
            )
        request = {"path": name, "name": subset, "revision": revision or None, "streaming": True}
    else:
        raise CourseError(
            f"There is no dataset {source!r}: use shima, a file ending in {', '.join(FILE_FORMATS)}, or a hub id."
        )

    streaming = request.get("streaming", False)
    disable_progress_bars()  # a bar for every table that is read would fill the notebooks
    try:
        rows = load_dataset(**request, split=split)
        if streaming:
            stream = islice(rows.shuffle(seed=seed, buffer_size=10_000), num_rows)
            rows = Dataset.from_list(list(tqdm(stream, total=num_rows, desc=f"reading {name}", unit="row")))
        else:
            rows = rows.shuffle(seed=seed, keep_in_memory=True)
    except Exception as error:  # damaged files, unknown names and broken connections raise a dozen kinds of errors
        cause = error.__cause__ or error
        reason = str(cause).split("\n")[0].rstrip(".") or type(cause).__name__
        raise CourseError(f"The dataset {source} cannot be read ({reason}): repair it or name another one.") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise CourseError(
            f"{source} has no column {missing[0]!r} but {', '.join(rows.column_names)}: name another source, "
            "or rename its columns."
        )
    return rows.select_columns(list(columns)).select(range(min(num_rows or len(rows), len(rows))))


def pack(documents: Iterable[list[int]], seq_len: int) -> Iterator[list[int]]:
    """Concatenate tokenised documents, each of which ends with the end-of-text token, and cut rows of `seq_len` tokens.

    What is left at the end and does not fill a row is dropped.
    """
    tokens: list[int] = []
    for document in documents:
        tokens += document
        whole = len(tokens) - len(tokens) % seq_len
        for start in range(0, whole, seq_len):
            yield tokens[start : start + seq_len]
        tokens = tokens[whole:]


class PackedBatches:
    """An endless stream of packed batches {"input_ids": (batch_size, seq_len)} that can be entered at any position.

    The stream is made of numbered blocks of `batches_per_block` batches. A block takes as many documents from
    `documents_of_block(number)` as it needs, joins them with the end-of-text token, cuts them into rows and shuffles
    the rows; what does not fill its last row is dropped. So a batch depends on its block alone, and `seek` jumps
    without making what lies before. Iterating continues from `position`, the number of batches handed out so far.
    """

    def __init__(
        self,
        documents_of_block: Callable[[int], Iterable[str]],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seq_len: int,
        *,
        batches_per_block: int = 16,
    ):
        """Set up the stream at position 0.

        `documents_of_block` must give the same documents each time, and enough of them to fill a block. Raises
        CourseError where they are too few, at the block that they do not fill, and for a tokenizer without an
        end-of-text token.
        """
        if tokenizer.eos_token_id is None:
            raise CourseError("The tokenizer has no end-of-text token to put between documents: set its eos_token.")
        self.documents_of_block = documents_of_block
        self.end_of_text = tokenizer.eos_token_id
        self.batch_size, self.seq_len, self.batches_per_block = batch_size, seq_len, batches_per_block
        self.position = 0
        self._block = (-1, torch.empty(0))  # number and rows of the block made last
        # A copy, since a call of the tokenizer with padding or truncation leaves that switched on for everybody.
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._encoder.no_padding()
        self._encoder.no_truncation()

    def seek(self, position: int) -> None:
        """Continue with batch number `position`, counted from 0."""
        self.position = position

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the current position on, without end."""
        while True:
            block, index = divmod(self.position, self.batches_per_block)
            if self._block[0] != block:
                self._block = (block, self._rows_of(block))
            self.position += 1
            rows = self._block[1][index * self.batch_size : (index + 1) * self.batch_size]
            yield {"input_ids": rows.clone()}  # a loss may write into its batch, the block must stay as it is

    def _rows_of(self, block: int) -> torch.Tensor:
        num_rows = self.batches_per_block * self.batch_size
        rows = list(islice(pack(self._tokenised(block), self.seq_len), num_rows))
        if len(rows) < num_rows:
            raise CourseError(
                f"The documents of block {block} fill {len(rows)} rows of {self.seq_len} tokens and {num_rows} are "
                "needed: give an endless stream of them, or lower batches_per_block."
            )
        # Neighbouring rows may share a document: a batch should not hold them together.
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(block))
        return torch.tensor(rows)[order]  # (rows, seq)

    def _tokenised(self, block: int) -> Iterator[list[int]]:
        documents = iter(self.documents_of_block(block))
        while chunk := list(islice(documents, 256)):
            for encoding in self._encoder.encode_batch_fast(chunk, add_special_tokens=False):
                yield [*encoding.ids, self.end_of_text]


class PaddedBatches:
    """An endless stream of padded batches of `examples`, in a new order each epoch, that can be entered anywhere.

    An example is {"input_ids": [...], "labels": [...]}, as `chat.encode_chat` gives it. Rows that do not fill the last
    batch of an epoch are left out of that epoch.
    """

    def __init__(self, examples: Sequence[dict[str, list[int]]], batch_size: int, pad_id: int, *, seed: int = 0):
        """Set up the stream at position 0. Raises CourseError for an empty batch, or fewer examples than it holds."""
        if batch_size < 1:
            raise CourseError(f"batch_size is {batch_size}: a batch takes at least one example.")
        if len(examples) < batch_size:
            raise CourseError(
                f"There are {len(examples)} examples and a batch takes {batch_size}: give more examples, or lower "
                "batch_size."
            )
        self.examples, self.batch_size, self.pad_id, self.seed = examples, batch_size, pad_id, seed
        self.batches_per_epoch = len(examples) // batch_size
        self.position = 0

    def seek(self, position: int) -> None:
        """Continue with batch number `position`, counted from 0 over all epochs."""
        self.position = position

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the current position on, without end."""
        while True:
            epoch, index = divmod(self.position, self.batches_per_epoch)
            order = random.Random(f"{self.seed}/{epoch}").sample(range(len(self.examples)), len(self.examples))
            self.position += 1
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield collate([self.examples[row] for row in chosen], self.pad_id)


def collate(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples of "input_ids" and "labels" on the right; every tensor of the batch is (batch, longest).

    Padded positions carry the label -100, which cross-entropy ignores. Examples without labels get their own tokens.
    """
    length = max(len(example["input_ids"]) for example in examples)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        tokens, padding = example["input_ids"], length - len(example["input_ids"])
        columns["input_ids"].append(tokens + [pad_id] * padding)
        columns["attention_mask"].append([1] * len(tokens) + [0] * padding)
        columns["labels"].append(example.get("labels", tokens) + [-100] * padding)
    return {name: torch.tensor(rows) for name, rows in columns.items()}
