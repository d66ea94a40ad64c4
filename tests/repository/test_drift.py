"""Every argument that the course gives to a library is one that the installed version takes, and still wants."""

from collections import Counter
from pathlib import Path

import nbformat
import pytest
import transformers
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.profiles import ROOT
from tests.support import library_calls
from tests.support.library_calls import Findings, check_file, check_sources

FILES = sorted(
    path
    for folder in ("notebooks", "helpers", "course", "recipes", "tests")
    for path in (ROOT / folder).glob("**/*.[ip]*y*")
    if "source" not in path.parts and "__pycache__" not in path.parts
)
LEAST = {"transformers": 120, "tokenizers": 20, "peft": 15, "datasets": 10, "bitsandbytes": 12, "trl": 4}


@pytest.fixture(scope="module")
def found() -> dict[Path, Findings]:
    return {path: check_file(path) for path in FILES}


def problems(source: str) -> list[str]:
    return check_sources([("planted", source)]).problems


# The course


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_argument_for_a_library_is_one_that_it_takes(path: Path, found: dict[Path, Findings]) -> None:
    assert found[path].problems == []


def test_the_calls_of_the_course_are_found(found: dict[Path, Findings]) -> None:
    calls = sum((findings.calls for findings in found.values()), Counter())
    assert not {library: calls[library] for library in LEAST if calls[library] < LEAST[library]}
    assert sum(findings.keywords for findings in found.values()) >= 350


def test_calls_are_found_in_every_notebook_that_imports_a_trainer_or_an_adapter(found: dict[Path, Findings]) -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        for library in ("trl", "peft"):
            if f'"from {library} import' in text or f'"import {library}\\n' in text:
                assert found[path].calls[library] >= 1, f"{path.name} imports {library}"


def test_what_is_listed_as_read_from_kwargs_still_stands_in_the_library() -> None:
    package = Path(transformers.__file__).parent
    source = "".join(path.read_text("utf-8") for path in [*package.glob("*.py"), *package.glob("models/auto/*.py")])
    behind = {name: names for name, (_, names) in library_calls.BEHIND.items() if name != "GenerationConfig"}
    listed = {name for names in behind.values() for name in names}
    assert [name for name in sorted(listed) if f'"{name}"' not in source and f"self.{name} =" not in source] == []


# Planted mistakes

WRONG = {
    "evaluation_strategy": (
        "from transformers import TrainingArguments\nTrainingArguments(output_dir='x', evaluation_strategy='steps')"
    ),
    "no_cuda": "import transformers\nif True:\n    args = transformers.TrainingArguments('x', no_cuda=True)",
    "max_prompt_length": "from trl import GRPOConfig\n\ndef f():\n    return GRPOConfig('x', max_prompt_length=64)",
    "max_seq_length": "import trl\nsettings = {'max_seq_length': 9}\ntrl.SFTConfig('x', bf16=False, **settings)",
    "tokenizer": (
        "from trl import SFTTrainer\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('x')\n"
        "SFTTrainer('x', tokenizer=tokenizer)"
    ),
    "load_in_4bit": (
        "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained('x', load_in_4bit=True)"
    ),
    "torch_dtype": (  # still works, and only warns
        "from transformers import AutoModelForCausalLM as Auto\n"
        "options = dict(device_map='cpu')\n"
        "options |= {'torch_dtype': 'float16'}\n"
        "Auto.from_pretrained('x', **options)"
    ),
    "gradient_checkpointing_kwargs": (  # deprecated, says the field's help
        "from trl import DPOConfig\nDPOConfig('x', gradient_checkpointing_kwargs={})"
    ),
    "lora_alfa": "import peft\npeft.LoraConfig(r=4, **({'lora_alfa': 8} if True else {}))",
    "rope_theta_": "from transformers import LlamaConfig\nLlamaConfig(rope_theta_=1.0)",
    "extra": (
        "from helpers.models import load_model\n"
        "model, tokenizer = load_model('x')\n"
        "tokenizer.save_vocabulary('x', extra=1)"
    ),
    "prefix_space": "from tokenizers import pre_tokenizers as pre\npre.ByteLevel(prefix_space=False)",
    "vocabulary": "from tokenizers.trainers import BpeTrainer\nBpeTrainer(vocabulary=300)",
    "layers": (
        "from transformers import LlamaForCausalLM\n\n"
        "def f(model: LlamaForCausalLM):\n    return model.eval()(input_ids=None, layers=2)"
    ),
    "max_tokens": "from transformers import GenerationConfig\nGenerationConfig(max_tokens=3)",
    "quant": "import bitsandbytes as bnb\nlayer = bnb.nn.Linear4bit(64, 64, quant='nf4')",
    "resume": (
        "import copy\nfrom trl import DPOTrainer\n"
        "trainer = DPOTrainer('x')\nagain = copy.deepcopy(trainer)\nagain.train(resume=True)"
    ),
}


@pytest.mark.parametrize("keyword", WRONG)
def test_a_planted_wrong_argument_is_reported_with_its_place(keyword: str) -> None:
    (problem,) = problems(WRONG[keyword])
    assert problem.startswith("planted line ") and f" {keyword}" in problem, problem


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from trl import PPOTrainer", "trl has no PPOTrainer"),
        ("from transformers.optimization import AdamW", "transformers.optimization has no AdamW"),
        ("import trl.core_utils", "there is no module trl.core_utils"),
        ("import peft\nconfig = peft.LoRAConfig(r=4)", "peft has no LoRAConfig"),
        ("from transformers import AutoModel\nAutoModel.from_hub('x')", "AutoModel has no from_hub"),
        ("import peft\npeft.get_peft_model(1, 2, 'a', True, True, None, False, 9)", "7 positional arguments"),
    ],
)
def test_a_name_that_is_gone_and_an_argument_too_many_are_reported(source: str, missing: str) -> None:
    (problem,) = problems(source)
    assert missing in problem


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import TrainingArguments\nTrainingArguments(output_dir='x', eval_strategy='no')",
        "def SFTConfig(tokenizer):\n    pass\n\nSFTConfig(tokenizer=1)",
        "from trl import SFTConfig\n\ndef f(SFTConfig):\n    SFTConfig(evaluation_strategy=1)",
        "import trl\ntrainer = trl.SFTTrainer('x')\ntrainer = other()\ntrainer.train(anything=1)",
        "from transformers import AutoModelForCausalLM as A\nA.from_pretrained('x', dtype='auto', device_map='cpu')",
        "import trl\ntrl.SFTConfig('x', **unknown)",
    ],
)
def test_what_is_right_or_not_known_is_left_alone(source: str) -> None:
    assert problems(source) == []


def test_a_problem_in_a_notebook_names_file_cell_and_line(tmp_path: Path) -> None:
    solution = "<details>\n\n```python\nSFTConfig('x', dataset_batch_size=1)\n```\n\n</details>"
    cells = [
        new_code_cell("%matplotlib inline\nfrom trl import SFTConfig"),
        new_markdown_cell("text"),
        new_code_cell("seed = 0\narguments = SFTConfig('x', seed=seed, evaluation_strategy='no')"),
        new_markdown_cell(solution),
    ]
    path = tmp_path / "03_planted.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    assert check_file(path).problems == [
        "03_planted.ipynb code cell 2 line 2: SFTConfig does not take evaluation_strategy",
        "03_planted.ipynb python block in cell 3 line 1: SFTConfig does not take dataset_batch_size",
    ]
