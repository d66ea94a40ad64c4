import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from helpers.errors import CourseError
from helpers.generation import generate, sequence_log_probs, token_log_probs

TEXT = [
    "Mira lives in Oro and keeps bees.",
    "Question: where does Teo live?\nAnswer: in Sund.\n",
    "3 + 14 + 9 = 26; the sum of three numbers.",
    "An island (島) has hills, goats and 11 ponds.",
]
PROMPTS = [
    "Mira lives",
    "Question: where does Teo live?\nAnswer:",
    "3 + 14",
    "",
    "島",
    "An island has hills and",
    "3 + 14",
]
SMALL = {"vocab_size": 300, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0}
ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **ROPE, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, **ROPE, num_key_value_heads=1),
    "mistral": MistralConfig(**SMALL, **ROPE, num_key_value_heads=2, sliding_window=12),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>"]
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def tiny_model(family="llama", **overrides):
    torch.manual_seed(1)
    config = type(CONFIGS[family]).from_dict({**CONFIGS[family].to_dict(), **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # at the default scale of 0.02 a random model repeats one token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


def greedy_by_hand(model, tokenizer, prompt, max_new_tokens):
    """Whole sequence again at every step: no cache, no padding, no batch."""
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    new = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_equals_decoding_by_hand_without_cache_padding_or_batch(family, tokenizer):
    model = tiny_model(family)
    expected = [greedy_by_hand(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len(set(expected)) > 4
    assert generate(model, tokenizer, PROMPTS, 24, stop=()) == expected
    assert generate(model, tokenizer, PROMPTS, 24, stop=(), batch_size=2) == expected


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_equals_that_of_transformers_generate(family, tokenizer):
    model = tiny_model(family)
    for prompt in PROMPTS:
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        new = [token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        assert generate(model, tokenizer, [prompt], 24, stop=()) == [tokenizer.decode(new)]


@pytest.mark.parametrize("penalty", [0.8, 1.2, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty, tokenizer):
    model = tiny_model()
    settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": penalty}
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        new = [token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        expected.append(tokenizer.decode(new))
    assert generate(model, tokenizer, PROMPTS, 24, stop=(), repetition_penalty=penalty) == expected
    assert generate(model, tokenizer, PROMPTS, 24, stop=()) != expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_text_does_not_depend_on_its_neighbours_order_or_batch_size(attention, tokenizer):
    model = tiny_model("qwen2")
    model.set_attn_implementation(attention)
    for settings in ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.8, "seed": 5}):
        together = generate(model, tokenizer, PROMPTS[:6], 20, stop=(), **settings)
        assert together[::-1] == generate(model, tokenizer, PROMPTS[5::-1], 20, stop=(), batch_size=4, **settings)
        assert together == [generate(model, tokenizer, [p], 20, stop=(), **settings)[0] for p in PROMPTS[:6]]


def test_a_repeated_prompt_gets_new_samples_and_the_same_ones_as_num_samples(tokenizer):
    model = tiny_model()
    samples = generate(model, tokenizer, ["Mira", "Teo"], 12, temperature=1.0, num_samples=5, batch_size=3)
    assert samples == [generate(model, tokenizer, [prompt] * 5, 12, temperature=1.0) for prompt in ("Mira", "Teo")]
    assert len(set(samples[0])) == 5
    assert samples != generate(model, tokenizer, ["Mira", "Teo"], 12, temperature=1.0, num_samples=5, seed=1)


def test_a_sample_does_not_depend_on_the_number_of_tokens_asked_for(tokenizer):
    model = tiny_model()
    short, long = (generate(model, tokenizer, ["Mira"], n, stop=(), temperature=1.0)[0] for n in (5, 40))
    assert long.startswith(short.rstrip("\ufffd")) and len(long) > len(short)


def first_token_probabilities(model, tokenizer, prompt, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    return (logits / temperature).softmax(-1)


def test_samples_follow_the_distribution_of_the_model(tokenizer):
    model, draws = tiny_model(), 4000
    probabilities = first_token_probabilities(model, tokenizer, "Mira", 2.0)
    settings = {"stop": (), "temperature": 2.0, "num_samples": draws, "batch_size": 999}
    samples = generate(model, tokenizer, ["Mira"], 1, **settings)[0]
    texts = [tokenizer.decode([token]) for token in range(1, 300)]  # a few tokens share the text U+FFFD
    for text in {texts[token - 1] for token in probabilities.topk(8).indices}:
        expected = sum(p.item() for p, other in zip(probabilities[1:], texts, strict=True) if other == text)
        assert abs(samples.count(text) / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_top_p_keeps_the_smallest_set_of_tokens_that_holds_the_mass(tokenizer):
    model, top_p = tiny_model(), 0.3
    ordered, tokens = first_token_probabilities(model, tokenizer, "Mira", 2.0).sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1
    assert 3 < size < 60
    nucleus = {tokenizer.decode([token]).replace("<|end|>", "") for token in tokens[:size]}
    settings = {"stop": (), "temperature": 2.0, "top_p": top_p, "num_samples": 3000, "batch_size": 999}
    assert set(generate(model, tokenizer, ["Mira"], 1, **settings)[0]) == nucleus


def test_a_tiny_top_p_is_greedy(tokenizer):
    model = tiny_model()
    greedy = generate(model, tokenizer, PROMPTS, 10)
    assert generate(model, tokenizer, PROMPTS, 10, temperature=1.0, top_p=1e-9) == greedy


def test_the_text_ends_before_the_first_stop_string_even_when_it_spans_tokens(tokenizer):
    model = tiny_model()
    full = generate(model, tokenizer, PROMPTS, 30, stop=())
    for width in (1, 2, 3, 5):
        stop = [text[7 : 7 + width] for text in full[:3]]
        expected = [text[: min([text.find(s) for s in stop if s in text], default=None)] for text in full]
        assert generate(model, tokenizer, PROMPTS, 30, stop=stop) == expected
        assert expected != full
    assert generate(model, tokenizer, PROMPTS, 30, stop="e") == [text.split("e")[0] for text in full]


def test_a_stop_character_made_of_several_tokens_is_found(tokenizer):
    model = tiny_model()
    character = tokenizer("€")["input_ids"]
    assert len(character) == 3
    script = tokenizer("ab€cd")["input_ids"]
    # a model of one layer of nothing: the next token is a function of the last one, written into the embeddings
    model = tiny_model(num_hidden_layers=1, hidden_size=512, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(300, 512))
        model.lm_head.weight.zero_()
        for token, following in zip(script, [*script[1:], tokenizer.eos_token_id], strict=True):
            model.lm_head.weight[following, token] = 1.0
    assert generate(model, tokenizer, ["a"], 20, stop=()) == ["b€cd"]
    assert generate(model, tokenizer, ["a"], 20, stop=("€",)) == ["b"]
    assert generate(model, tokenizer, ["a"], 20, stop=("€c",)) == ["b"]


def test_special_tokens_stay_visible_and_can_stop_the_text(tokenizer):
    model = tiny_model()
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    with torch.no_grad():  # every token is followed by <|user|>
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.eye(300)[user])
    assert generate(model, tokenizer, ["Mira"], 3) == ["<|user|>" * 3]
    assert generate(model, tokenizer, ["Mira"], 3, stop=("<|user|>",)) == [""]


def test_every_end_token_of_the_model_ends_the_text(tokenizer):
    model = tiny_model()
    text = generate(model, tokenizer, ["Mira"], 20, stop=())[0]
    letter = next(character for character in text[3:] if character.isascii() and character not in text[:3])
    model.generation_config.eos_token_id = [0, *(i for i in range(300) if letter in tokenizer.decode([i]))]
    shorter = generate(model, tokenizer, ["Mira"], 20, stop=())[0]
    assert text.startswith(shorter) and 3 <= len(shorter) <= text.index(letter)


def test_log_probs_equal_a_loop_over_single_tokens_and_ignore_padding(tokenizer):
    completions = [" in Oro.", " in Sund.\n", " + 9 = 26", "Mira", "", " goats, and 11 ponds 島.", " + 8"]
    for family in CONFIGS:
        model = tiny_model(family)
        expected = []
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            ids, total = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id], 0.0
            for token in tokenizer(completion)["input_ids"]:
                with torch.no_grad():
                    total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
                ids = [*ids, token]
            expected.append(total)
        for batch_size in (1, 3, 64):
            actual = sequence_log_probs(model, tokenizer, PROMPTS, completions, batch_size=batch_size)
            torch.testing.assert_close(actual, torch.tensor(expected), atol=2e-4, rtol=1e-5)
        assert actual[4] == 0.0 and actual[0] < -1


def test_token_log_probs_skip_masked_labels_and_let_gradients_flow():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [-100, 0, 6]])
    result = token_log_probs(logits, labels)
    reference = logits.float().log_softmax(-1)
    assert result.dtype == torch.float32 and result.shape == (2, 3)
    for row, column in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        torch.testing.assert_close(result[row, column], reference[row, column, labels[row, column]])
    assert result[0, 2] == result[1, 0] == 0
    result.sum().backward()
    assert logits.grad[0, 2].abs().sum() == 0 and logits.grad[0, 0].abs().sum() > 0


def test_dropout_is_off_while_decoding_and_the_model_comes_back_as_it_was(tokenizer):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = generate(model, tokenizer, PROMPTS, 10)
    model.train()
    model.transformer.h[0].eval()
    assert generate(model, tokenizer, PROMPTS, 10) == expected
    assert model.training and model.transformer.h[1].mlp.training and not model.transformer.h[0].mlp.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_and_scores_close_to_float32(dtype, tokenizer):
    model = tiny_model()
    exact = sequence_log_probs(model, tokenizer, ["Mira lives", "3"], [" in Oro", " + 14 = 17"])
    rough = sequence_log_probs(model.to(dtype), tokenizer, ["Mira lives", "3"], [" in Oro", " + 14 = 17"])
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.5)
    assert len(generate(model, tokenizer, PROMPTS, 8, temperature=1.0, top_p=0.9)) == len(PROMPTS)


def test_a_prompt_too_long_for_the_window_is_named(tokenizer):
    model = tiny_model()
    fits = tokenizer.decode(tokenizer("3 + 14 + 9" * 40)["input_ids"][:86])
    assert len(generate(model, tokenizer, ["Mira", fits], 10)) == 2
    with pytest.raises(CourseError, match=r"Prompt 1 with 11 new tokens is 97 tokens long, .* window is 96 tokens"):
        generate(model, tokenizer, ["Mira", fits], 11)
    with pytest.raises(CourseError, match="Prompt 0 with its completion"):
        sequence_log_probs(model, tokenizer, [fits], [fits])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"num_samples": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"stop": [""]},
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(settings, tokenizer):
    with pytest.raises(CourseError, match="generate got"):
        generate(tiny_model(), tokenizer, ["Mira"], **{"max_new_tokens": 5, **settings})


def test_wrong_shapes_of_input_are_refused_and_empty_lists_are_fine(tokenizer):
    model = tiny_model()
    with pytest.raises(CourseError, match="one string"):
        generate(model, tokenizer, "Mira", 5)
    with pytest.raises(CourseError, match="1 prompts and 2 completions"):
        sequence_log_probs(model, tokenizer, ["a"], ["b", "c"])
    assert generate(model, tokenizer, [], 5) == []
    assert sequence_log_probs(model, tokenizer, [], []).shape == (0,)


@pytest.mark.gpu
def test_the_gpu_gives_the_texts_of_the_cpu(tokenizer):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = tiny_model()
    expected = generate(model, tokenizer, PROMPTS, 10, temperature=1.0)
    assert generate(model.cuda(), tokenizer, PROMPTS, 10, temperature=1.0) == expected
