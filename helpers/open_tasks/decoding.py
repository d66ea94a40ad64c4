"""How a submission decodes: settings that can be written to a file, and answers by them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.chat import chat_prompt, end_of_turn
from helpers.generation import generate, sequence_log_probs


@dataclass(frozen=True)
class Decoding:
    """The settings in `decode.json`. Of several samples the most frequent or the most probable one is the answer."""

    template: str | None = None  # a text with {input} in it; None is the chat format
    stop: tuple[str, ...] = ()  # further strings that end an answer, beside the end of a turn
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    vote: str = "frequent"  # or "probable"
    max_new_tokens: int = 80
    seed: int = 0


def answer_tasks(model, tokenizer, inputs: Sequence[str], decoding: Decoding) -> list[str]:
    """One answer to each input. In float32 it does not depend on the other inputs."""
    if decoding.template is None:
        prompts = [chat_prompt(tokenizer, text) for text in inputs]
    else:
        prompts = [decoding.template.replace("{input}", text) for text in inputs]
    samples = generate(
        model,
        tokenizer,
        prompts,
        decoding.max_new_tokens,
        stop=(end_of_turn(tokenizer), *decoding.stop),
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        repetition_penalty=decoding.repetition_penalty,
        num_samples=decoding.num_samples,
        seed=decoding.seed,
    )
    if decoding.num_samples == 1:
        return samples
    if decoding.vote == "frequent":
        return [Counter(drawn).most_common(1)[0][0] for drawn in samples]
    pairs = [(prompt, text) for prompt, drawn in zip(prompts, samples, strict=True) for text in drawn]
    scores = sequence_log_probs(model, tokenizer, *map(list, zip(*pairs, strict=True)))  # (prompts x samples,)
    best = scores.view(len(prompts), decoding.num_samples).argmax(1).tolist()
    return [drawn[place] for drawn, place in zip(samples, best, strict=True)]
