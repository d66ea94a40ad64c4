"""What the cards of the models and of the data set share: their header, as the Hugging Face hub reads it."""

from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCardData

from helpers.colab import REPOSITORY
from helpers.evaluation import Score
from helpers.files import sha256

HUB_OWNER = "llm-workbook"  # `python -m course publish --owner` puts another in its place
DATASET = f"{HUB_OWNER}/shima"
TAGS = ["shima", "teaching", "synthetic"]
COURSE = f"[LLM Workbook]({REPOSITORY})"
LICENCE = f"""## Licence

Weights, tokenizer and code are under the MIT licence; this text, and the text of Shima, under CC BY 4.0. Say that they
are from the {COURSE}.
"""


def model_header(name: str, scores: dict[str, Score], config: str, **more: Any) -> str:
    """The header of a model's card. The scores are those on the split "test" of this configuration of the data set."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=DATASET,
            dataset_name=f"Shima, {config}",
            dataset_config=config,
            dataset_split="test",
            metric_type="exact_match",
            metric_name=ability,
            metric_value=score.accuracy,
        )
        for ability, score in scores.items()
    ]
    return header(
        ModelCardData(
            license="mit",
            language="en",
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=TAGS,
            datasets=[DATASET],
            model_name=name,
            eval_results=results,
            **more,
        )
    )


def header(data: CardData) -> str:
    """The data between the lines that the hub looks for at the beginning of a card."""
    return f"---\n{data.to_yaml()}\n---\n"


def weights_line(folder: Path) -> str:
    """Which weights the card speaks about: `python -m course publish` refuses others."""
    return f"`model.safetensors`, SHA-256 `{sha256(folder / 'model.safetensors')}`"
