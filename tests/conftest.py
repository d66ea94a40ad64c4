"""Fixtures of several test files: a tiny model folder in hub format, and rows in the schemas of real datasets."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.models import tiny_config

TEXTS = [
    f"{name} is a {trade} in {town}. {name} is {age} years old and has {age % 7} goats."
    for name, trade in zip(
        ["Ada", "Bela", "Chiyo", "Dinu", "Eero"], ["baker", "smith", "mason", "cook", "tailor"], strict=True
    )
    for town in ["Nori", "Kasumi", "Hata"]
    for age in range(20, 60)
]


settings.register_profile("course", deadline=None)  # a busy machine is no failure
settings.load_profile("course")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `gpu` tells the most memory that it held; `pytest_terminal_summary` prints it."""
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    request.node.user_properties.append(("gib", torch.cuda.max_memory_allocated() / 2**30))


def pytest_terminal_summary(terminalreporter) -> None:
    """After a run on a GPU, one table of the tests marked `gpu`, to be committed as docs/gpu.md says."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    rows = [(report, dict(report.user_properties)) for report in reports if report.when == "call"]
    rows = [(report, properties["gib"]) for report, properties in rows if "gib" in properties]
    if not rows:
        return
    device = torch.cuda.get_device_properties(0)
    lines = [
        f"{device.name}, {device.total_memory / 2**30:.2f} GiB, compute capability {device.major}.{device.minor}, "
        f"torch {torch.__version__}",
        "",
        "| test | result | seconds | peak GiB |",
        "|---|---|---|---|",
        *(f"| {report.nodeid.rpartition('::')[2]} | {report.outcome} | {report.duration:.1f} | {gib:.2f} |"
          for report, gib in rows),
    ]  # fmt: skip
    terminalreporter.write_sep("=", "on a GPU")
    terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """600 short documents, all different."""
    return TEXTS


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; digits are split, and <|end|> ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 model and its tokenizer in bfloat16 safetensors, as the hub would hold them. Only for reading."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-qwen2"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2", vocab_size=len(tiny_tokenizer)), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file in the schema of roneneldan/TinyStories: one text a row."""
    return _write_jsonl(tmp_path_factory.mktemp("rows") / "stories.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="session")
def messages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file in the schema of HuggingFaceTB/smoltalk: the turns of a chat, and where it is from."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Repeat: {text}"},
                {"role": "assistant", "content": text},
            ],
            "source": "tests",
        }
        for text in TEXTS[:50]
    ]
    return _write_jsonl(tmp_path_factory.mktemp("rows") / "messages.jsonl", rows)


def _write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
