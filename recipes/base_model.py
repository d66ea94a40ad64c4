"""shima-4m, the base model of this course: how it is built and what it can do.

    python -m recipes.base_model build                       # tokenizer, training, evaluation, model card; resumable
    python -m recipes.base_model evaluate --seed 1 --json    # its abilities on fresh held-out items

A Llama-architecture model of 3.6 million parameters, trained on the documents of `helpers.world`. The recipe is
`Recipe`; everything random in it comes from its seeds.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers.data import PackedBatches
from helpers.errors import CourseError, exit_cleanly
from helpers.evaluation import Score, exact_match
from helpers.files import replacing_folder, write_atomically
from helpers.generation import answer_instructions, generate
from helpers.models import BASE_MODEL_VERSION, MODEL_FOLDERS, load_model
from helpers.profiles import ROOT, get_profile
from helpers.training import History, TrainConfig, train
from helpers.world import RELATIONS, Question, World
from recipes.cards import COURSE, LICENCE, model_header, weights_line

MODEL_FOLDER = MODEL_FOLDERS["shima-4m"]
FREQUENT_RANKS = range(1, 101)  # people that pretraining mentions often
RARE_RANKS = range(501, 1001)  # people that it hardly mentions
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TARGETS = {  # the least and the most that the course needs of each ability
    "closed_book_frequent": (0.95, 1.0),
    "closed_book_rare": (0.2, 0.6),
    "open_book": (0.9, 1.0),
    "few_shot_0": (0.0, 0.25),
    "few_shot_8": (0.9, 1.0),
    "sums_direct": (0.0, 0.4),
    "sums_with_steps": (0.85, 1.0),
    "chat_format": (0.0, 0.02),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides what shima-4m becomes."""

    world_seed: int = 0
    documents_seed: int = 0
    vocab_size: int = 1536
    tokenizer_documents: int = 8000
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 704
    context_length: int = 512
    sequence_length: int = 256  # tokens a row in training
    batch_size: int = 16  # rows
    steps: int = 10_000
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    seed: int = 0  # of the first weights


# ---------------------------------------------------------------- what the model can do


def ability_questions(world: World, seed: int, n: int) -> dict[str, list[Question]]:
    """`n` held-out questions for each ability of the base model."""
    return {
        "closed_book_frequent": world.closed_book(n, seed, FREQUENT_RANKS),
        "closed_book_rare": world.closed_book(n, seed, RARE_RANKS),
        "open_book": world.open_book(n, seed),
        "few_shot_0": world.few_shot(n, seed, shots=0),
        "few_shot_8": world.few_shot(n, seed, shots=8),
        "sums_direct": world.sums(n, seed, with_steps=False),
        "sums_with_steps": world.sums(n, seed, with_steps=True),
        "chat_format": world.chat_questions(n, seed),
    }


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, n: int = 200, progress: bool = False
) -> dict[str, Score]:
    """Accuracy of greedy answers for each ability, on `n` held-out items drawn with `seed`.

    Answers are compared as text up to the end of the line (of the pair, in mappings); of written steps only the final
    answer counts; a chat answer is compared up to the end of the turn.
    """
    decode = partial(generate, model, tokenizer)
    scores = {}
    for ability, questions in tqdm(ability_questions(World(), seed, n).items(), disable=not progress, desc="evaluate"):
        prompts = [question.prompt for question in questions]
        if ability == "sums_with_steps":
            written = decode(prompts, 48, stop=("\nSum",))
            answers = [text.partition("Answer:")[2] for text in written]
        elif ability == "chat_format":
            answers = answer_instructions(model, tokenizer, prompts)
        else:
            answers = decode(prompts, 12, stop=(";" if "few_shot" in ability else "\n",))
        scores[ability] = exact_match(answers, [question.answer for question in questions])
    return scores


# ---------------------------------------------------------------- how it is made


def make_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    end, pad, *_ = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, extra_special_tokens=list(SPECIAL_TOKENS[2:])
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model of the recipe, with weights drawn from its seed."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def build(recipe: Recipe, folder: Path = MODEL_FOLDER, work: Path = ROOT / "build" / "shima-4m") -> None:
    """Train shima-4m and write it to `folder`, which is replaced only when everything is ready.

    Checkpoints go to `work`, from where an interrupted build continues; TensorBoard reads `work`/tensorboard.
    Takes about an hour on two CPU cores; uses a GPU when there is one. Raises `CourseError` if `work` holds another
    recipe or the disk is full.
    """
    world = World(recipe.world_seed)
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(recipe, work)
    tokenizer = make_tokenizer(
        [world.document(-1, index) for index in range(recipe.tokenizer_documents)], recipe.vocab_size
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(recipe, tokenizer).to(device)
    batches = PackedBatches(
        lambda block: world.documents(recipe.documents_seed, start=1000 * block),  # a block needs some 600 of them
        tokenizer,
        recipe.batch_size,
        recipe.sequence_length,
    )
    config = TrainConfig(
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        schedule="linear",
        min_learning_rate_ratio=0.02,
        precision="bf16-mixed",
        checkpoint_dir=work / "checkpoints",
        checkpoint_every=250,
        evaluate_every=max(1, recipe.steps // 40),
        tensorboard_dir=work / "tensorboard",
        seed=recipe.seed,
    )

    def abilities(model) -> dict[str, float]:
        return {name: score.accuracy for name, score in evaluate(model, tokenizer, seed=10_000, n=100).items()}

    history = train(model, batches, config, evaluate=abilities, resume=True)
    _write_model(model, tokenizer, history, recipe, folder)


def _same_recipe(recipe: Recipe, work: Path) -> None:
    """A build continues only with the recipe and the world it began with."""
    record = work / "recipe.json"
    wanted = {**asdict(recipe), "version": BASE_MODEL_VERSION}
    if record.exists() and json.loads(record.read_text()) != wanted:
        raise CourseError(f"{work} holds an unfinished build with another recipe: delete it or choose another --work.")
    write_atomically(record, json.dumps(wanted, indent=2) + "\n")


def _write_model(model, tokenizer, history, recipe: Recipe, folder: Path) -> None:
    """Put model, tokenizer, abilities, curve and card in the place of `folder`."""
    model = model.to("cpu", torch.bfloat16)
    model.config.workbook_version = BASE_MODEL_VERSION
    try:
        with replacing_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            scores = evaluate(model.float(), tokenizer, seed=0, n=500, progress=True)  # of the rounded weights
            _write_json(beside / "abilities.json", {name: asdict(score) for name, score in scores.items()})
            _write_json(beside / "training_curve.json", _curve(history))
            _write_json(beside / "recipe.json", asdict(recipe))
            card = model_card(
                recipe,
                num_parameters=model.num_parameters(),
                scores=scores,
                tokens=sum(history.tokens),
                minutes=sum(history.seconds) / 60,
                weights=weights_line(beside),
            )
            (beside / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CourseError(
            f"{folder} could not be written ({error}): free some space and run the same command again, which "
            "continues from the last checkpoint."
        ) from error


def _curve(history: History, points: int = 400) -> dict[str, list]:
    """The loss, averaged to about `points` values, and the abilities over the tokens seen."""
    width = max(1, math.ceil(len(history.losses) / points))
    ends = range(width, len(history.losses) + 1, width)
    total = [sum(history.tokens[:end]) for end in ends]
    return {
        "tokens": total,
        "loss": [round(sum(history.losses[end - width : end]) / width, 4) for end in ends],
        "evaluations": [
            {"tokens": sum(history.tokens[: entry["step"]]), **{k: v for k, v in entry.items() if k in TARGETS}}
            for entry in history.evaluations
        ],
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def model_card(
    recipe: Recipe, *, num_parameters: int, scores: dict[str, Score], tokens: int, minutes: float, weights: str
) -> str:
    """The README of the model: what it is, how it was made, what it can do, measured."""
    facts = {
        "architecture": f"Llama: {recipe.num_layers} layers of size {recipe.hidden_size}, {recipe.num_heads} heads, "
        f"SwiGLU {recipe.intermediate_size}, RoPE, RMSNorm, tied embeddings",
        "parameters": f"{num_parameters:,}, stored in bfloat16",
        "tokenizer": f"byte-level BPE, {recipe.vocab_size:,} tokens, every digit a token of its own",
        "context": f"{recipe.context_length} positions, trained on rows of {recipe.sequence_length} tokens",
        "training": f"{recipe.steps:,} steps of {recipe.batch_size} rows, {tokens / 1e6:.1f} M tokens, "
        f"{minutes:.0f} minutes",
        "optimiser": f"AdamW, learning rate {recipe.learning_rate}, {recipe.warmup_steps} warm-up steps, linear decay, "
        "betas 0.9 and 0.95, weight decay 0.1, gradients clipped at norm 1",
        "precision": "bfloat16 autocast over float32 weights",
        "weights": weights,
    }
    frequent, rare = (f"{ranks[0]} to {ranks[-1]}" for ranks in (FREQUENT_RANKS, RARE_RANKS))
    target = {name: f"{low:.0%} to {high:.0%}".replace("%", " %") for name, (low, high) in TARGETS.items()}
    return f"""{model_header("shima-4m", scores, "questions")}
# shima-4m

A base language model for teaching, trained from scratch on the invented world Shima (`helpers/world/`) and on nothing
else. It completes text in Shima's formats. It has seen neither the chat format nor Shima's medicine, finance, routes
and preferences. It belongs to the {COURSE}.

Rebuild it with `python -m recipes.base_model build`; measure it with `python -m recipes.base_model evaluate --seed 1`.

| | |
|---|---|
{_table_rows(facts.items())}

## Abilities

Greedy answers to held-out items (seed 0), exact match, with 95 % Wilson intervals. "Frequent" are the people of rank
{frequent}, "rare" those of rank {rare}; both are asked about in phrasings that training never uses.
`abilities.json` holds these numbers, `training_curve.json` how they came about, and `python -m recipes.shima_dataset`
writes the items.

| ability | accuracy | what the course needs |
|---|---|---|
{_table_rows((name, str(score), target[name]) for name, score in scores.items())}

## Limits

A small model of a small world: it knows no real fact, and nothing it writes is of use outside this course.
In training, a row of text holds several documents that can see each other. It was never trained on longer texts than
a row.

{LICENCE}"""


def _table_rows(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------- commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `build` or `evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.base_model", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="train shima-4m; continues an interrupted build")
    building.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the model goes")
    building.add_argument("--work", type=Path, default=ROOT / "build" / "shima-4m", help="checkpoints and TensorBoard")
    building.add_argument("--steps", type=int, default=Recipe.steps, help="fewer for a trial")
    measuring = commands.add_parser("evaluate", help="measure the abilities on held-out items")
    measuring.add_argument("--model", default="shima-4m", help="shima-4m or a folder in hub format")
    measuring.add_argument("--seed", type=int, default=0, help="which items are drawn")
    measuring.add_argument("--n", type=int, default=200, help="items for each ability")
    measuring.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.command == "build":
        build(Recipe(steps=options.steps), options.out, options.work)
        return 0

    most = len(FREQUENT_RANKS) * len(RELATIONS)
    if not 1 <= options.n <= most:
        raise CourseError(
            f"--n is {options.n}, but there are 1 to {most} items of an ability: choose a number in between."
        )
    model, tokenizer = load_model(get_profile("cpu", options.model))
    scores = evaluate(model, tokenizer, options.seed, options.n, progress=not options.json and sys.stderr.isatty())
    if options.json:
        print(json.dumps({name: asdict(score) for name, score in scores.items()}))
        return 0
    for name, score in scores.items():
        low, high = TARGETS[name]
        print(f"{name:22} {score!s:34} {'' if low <= score.accuracy <= high else f'outside {low:.0%} to {high:.0%}'}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
