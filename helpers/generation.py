"""Decode many prompts at once, and score given completions.

Works for any causal language model of transformers with a key-value cache, on CPU and GPU, in any float type. It
knows nothing about tasks or answers: `evaluation` judges what comes out. A prompt's text does not depend on the
other prompts, their order or the batch size (in float32; in 16 bits a near tie may fall either way).

Sources: top-p sampling is Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1; the
repetition penalty is Keskar et al. 2019, "CTRL", section 4.1, over prompt and continuation as in transformers.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from helpers.chat import chat_prompt, end_of_turn
from helpers.errors import CourseError


def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = ("\n",),
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str] | list[list[str]]:
    """Continue every prompt, and return the new text only, in the order of the prompts.

    A continuation ends at the end-of-text token, before the first of the `stop` strings, or after `max_new_tokens`.
    Other special tokens stay visible in the text. `temperature` 0 decodes greedily; above 0 it samples, from the
    smallest set of tokens that holds `top_p` of the probability. `repetition_penalty` divides the logits of tokens
    that stand in the text so far, and multiplies negative ones. With `num_samples` > 1 each prompt gets a list.
    The random numbers of a sample belong to (seed, prompt, number of the sample), so that a prompt that is given
    eight times gets the same eight continuations as one given once with `num_samples=8`.

    Raises `CourseError` for settings out of range and for prompts that leave no room in the context window.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    in_range = temperature >= 0 and 0 < top_p <= 1 and repetition_penalty > 0 and "" not in stop
    if not in_range or min(num_samples, batch_size, max_new_tokens) < 1:
        raise CourseError(
            f"generate got temperature={temperature}, top_p={top_p}, repetition_penalty={repetition_penalty}, "
            f"num_samples={num_samples}, max_new_tokens={max_new_tokens}, batch_size={batch_size}, stop={stop}: use a "
            "temperature of 0 or more, 0 < top_p <= 1, a penalty above 0, whole numbers from 1, and stop strings that "
            "are not empty."
        )
    encoded = _encode_prompts(tokenizer, prompts)
    _check_window(model, [len(ids) + max_new_tokens for ids in encoded], f"with {max_new_tokens} new tokens")

    # one sequence is a sample of a prompt; equal prompts stand together (they are read once) and similar lengths too
    sequences = [(index, sample) for index in range(len(prompts)) for sample in range(num_samples)]
    sequences.sort(key=lambda sequence: (len(encoded[sequence[0]]), encoded[sequence[0]]))
    draws = _uniform_draws(prompts, num_samples, max_new_tokens, seed) if temperature > 0 else None

    texts: dict[tuple[int, int], str] = {}
    with _evaluation_mode(model), tqdm(total=len(sequences), disable=not progress, unit="text") as bar:
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            uniforms = None if draws is None else torch.stack([draws[sequence] for sequence in batch])
            rows = [encoded[index] for index, _ in batch]
            decoded = _decode_batch(
                model, tokenizer, rows, max_new_tokens, stop, temperature, top_p, repetition_penalty, uniforms
            )
            texts.update(zip(batch, decoded, strict=True))
            bar.update(len(batch))
    samples = [[texts[index, sample] for sample in range(num_samples)] for index in range(len(prompts))]
    return samples if num_samples > 1 else [texts_of_prompt[0] for texts_of_prompt in samples]


@torch.inference_mode()
def _decode_batch(
    model, tokenizer, rows, max_new_tokens, stop, temperature, top_p, repetition_penalty, uniforms
) -> list[str]:
    """Decode token by token; `rows` are the prompts' token ids, `uniforms` (batch, max_new_tokens) or None."""
    distinct = {tuple(row): None for row in rows}
    order = {row: position for position, row in enumerate(distinct)}
    input_ids, mask, width = _pad_left(list(distinct), model.device, tokenizer, room=max_new_tokens)
    output = model(
        input_ids=input_ids,
        attention_mask=mask[:, :width],
        position_ids=(mask[:, :width].cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache, logits = output.past_key_values, output.logits[:, -1]  # (distinct, vocab)
    positions = mask[:, :width].sum(-1, keepdim=True)  # (distinct, 1): the position of the next token
    if len(distinct) < len(rows):
        copies = torch.tensor([order[tuple(row)] for row in rows], device=model.device)
        cache.batch_select_indices(copies)
        logits, mask, positions = logits[copies], mask[copies], positions[copies]
    if uniforms is not None:
        uniforms = uniforms.to(model.device)

    written = None  # (batch, vocab): which tokens stand in prompt or continuation, where that has a price
    if repetition_penalty != 1:
        written = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in enumerate(rows):
            written[row, ids] = True
    end_tokens = _end_tokens(model, tokenizer)
    may_end_stop: dict[int, bool] = {}  # token -> can a stop string end in it? Filled as tokens appear
    new_ids: list[list[int]] = [[] for _ in rows]
    texts: list[str | None] = [None] * len(rows)
    running = list(range(len(rows)))  # row of the tensors -> row of the batch
    for step in range(max_new_tokens):
        if written is not None:
            penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(written, penalised, logits)
        chosen = logits.argmax(-1) if uniforms is None else _sample(logits, temperature, top_p, uniforms[:, step])
        for row, token in zip(running, chosen.tolist(), strict=True):
            if token in end_tokens:
                texts[row] = _text(tokenizer, new_ids[row])
                continue
            new_ids[row].append(token)
            if token not in may_end_stop:
                may_end_stop[token] = _may_end_stop(tokenizer, token, stop)
            if may_end_stop[token]:
                texts[row] = _cut(_text(tokenizer, new_ids[row]), stop)
        keep = [position for position, row in enumerate(running) if texts[row] is None]
        if not keep or step + 1 == max_new_tokens:
            break
        if len(keep) < len(running):  # finished sequences leave the batch and the cache
            running = [running[position] for position in keep]
            kept = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(kept)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
            uniforms = None if uniforms is None else uniforms[kept]
            written = None if written is None else written[kept]
        if written is not None:
            written.scatter_(1, chosen[:, None], True)
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask[:, : width + step + 1],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits, positions = output.logits[:, -1], positions + 1
    return [_text(tokenizer, ids) if text is None else text for ids, text in zip(new_ids, texts, strict=True)]


def answer_instructions(model, tokenizer, instructions: Sequence[str], max_new_tokens: int = 80, **settings):
    """Ask each instruction in a chat of its own and return the answers: `generate` up to the end of the turn."""
    prompts = [chat_prompt(tokenizer, instruction) for instruction in instructions]
    return generate(model, tokenizer, prompts, max_new_tokens, stop=(end_of_turn(tokenizer),), **settings)


def sequence_log_probs(
    model, tokenizer, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Return log p(completion | prompt) in nats, summed over the completion's tokens: (n,), float32, on the CPU.

    Prompt and completion are turned into tokens separately. No end-of-text token is added: write it into the
    completion to count it. An empty completion has log-probability 0. No gradients.

    Raises `CourseError` when the two lists differ in length or a pair is longer than the context window.
    """
    if len(prompts) != len(completions):
        raise CourseError(
            f"sequence_log_probs got {len(prompts)} prompts and {len(completions)} completions: give one of each."
        )
    encoded = _encode_prompts(tokenizer, prompts)
    endings = tokenizer(list(completions), add_special_tokens=False)["input_ids"] if completions else []
    pairs = [(list(prompt) + ending, len(ending)) for prompt, ending in zip(encoded, endings, strict=True)]
    _check_window(model, [len(ids) for ids, _ in pairs], "with its completion")

    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))
    result = torch.zeros(len(pairs))
    with _evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, mask, _ = _pad_left([pairs[index][0] for index in batch], model.device, tokenizer)
            # padding stands on the left, so all completions end at the last position: only the end needs logits
            longest = max(pairs[index][1] for index in batch)
            logits = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits[:, -longest - 1 : -1]  # (batch, longest, vocab)
            labels = input_ids[:, input_ids.shape[1] - longest :].clone()  # (batch, longest)
            for row, index in enumerate(batch):
                labels[row, : longest - pairs[index][1]] = -100
            result[batch] = token_log_probs(logits, labels).sum(-1).cpu()
    return result


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p(label) in nats for each position: logits (batch, seq, vocab), labels (batch, seq) -> (batch, seq).

    `labels[b, t]` is the token that `logits[b, t]` predicts: shift them first. Where the label is -100 the result
    is 0. Computed in float32; gradients flow.
    """
    losses = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(labels.shape)


def _sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the distribution function at `uniforms` (batch,): logits (batch, vocab)."""
    # float64, in the order of the vocabulary: what rounding does elsewhere must not move the draw to another token
    probabilities = (logits.double() / temperature).softmax(-1)  # (batch, vocab)
    if top_p < 1:
        ordered, tokens = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it already hold top_p
        probabilities = probabilities.masked_fill(outside.gather(-1, tokens.argsort(-1)), 0.0)
    distribution = probabilities.cumsum(-1)
    drawn = torch.searchsorted(distribution, uniforms[:, None] * distribution[:, -1:], right=True)
    return drawn.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _uniform_draws(prompts, num_samples: int, length: int, seed: int) -> dict[tuple[int, int], Tensor]:
    """One row of `length` uniform numbers for each (prompt, sample), from a generator of its own."""
    seen: Counter[str] = Counter()
    draws = {}
    for index, prompt in enumerate(prompts):
        for sample in range(num_samples):
            digest = hashlib.sha256(f"{seed} {seen[prompt]} {prompt}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            draws[index, sample] = torch.rand(length, generator=generator, dtype=torch.float64)
            seen[prompt] += 1
    return draws


def _encode_prompts(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise CourseError("The prompts are one string, but a list of strings is expected: write [prompt].")
    if not prompts:
        return []
    encoded = tokenizer(list(prompts))["input_ids"]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None and not all(encoded):
        raise CourseError("A prompt is empty and the tokenizer has no token to begin a text with: add some text.")
    return [ids or [start] for ids in encoded]


def _check_window(model, lengths: list[int], what: str) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and lengths and max(lengths) > window:
        raise CourseError(
            f"Prompt {lengths.index(max(lengths))} {what} is {max(lengths)} tokens long, but the model's context "
            f"window is {window} tokens: shorten the prompt or what is to follow it."
        )


def _pad_left(rows, device, tokenizer, room: int = 0) -> tuple[Tensor, Tensor, int]:
    """Return ids (batch, width), mask (batch, width + room) with 1 for tokens and for the room, and the width."""
    width = max(map(len, rows))
    padding = tokenizer.pad_token_id or 0  # never looked at: the mask hides it
    ids = [[padding] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * (len(row) + room) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), width


def _end_tokens(model, tokenizer) -> set[int]:
    # a model's generation settings may name several end tokens
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id] if token is not None}


def _may_end_stop(tokenizer, token: int, stop: tuple[str, ...]) -> bool:
    """Say whether a stop string can end in this token, so that the others need no look at the text."""
    text = _text(tokenizer, [token])
    # a part of a character decodes to U+FFFD alone; some tokenizers hide a leading space when a token stands alone
    return any(string[-1] in text or "\ufffd" in text or string[-1] == " " for string in stop)


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _cut(text: str, stop: tuple[str, ...]) -> str | None:
    """Return the text before the first stop string, or None when there is none in it."""
    found = [text.find(string) for string in stop if string in text]
    return text[: min(found)] if found else None


@contextmanager
def _evaluation_mode(model) -> Iterator[None]:
    """Switch dropout off, and give the model back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
