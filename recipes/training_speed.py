"""How fast is helpers.training.train? Its tokens/s beside a bare loop and transformers.Trainer, in turns.

python -m recipes.training_speed --rounds 5 --steps 40 prints the tokens/s of each round and the median of the ratios.
Ratios within a round are what counts: on a busy machine the absolute numbers move, the turns move together. Where
other work comes and goes within a turn, --cpu-time counts the seconds that the process computed, not those it waited.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from helpers.training import TrainConfig, train

LEARNING_RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0


def build_model(hidden_size: int, layers: int, device: str) -> LlamaForCausalLM:
    """A Llama with fresh weights, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def course_loop(model: LlamaForCausalLM, rows: torch.Tensor, batch_size: int, steps: int, bf16: bool) -> None:
    """`helpers.training.train`."""
    precision = "bf16-mixed" if bf16 else "fp32"
    batches = [{"input_ids": part} for part in rows.split(batch_size)]
    train(model, batches, TrainConfig(steps, LEARNING_RATE, schedule="linear", precision=precision, progress=False))


def bare_loop(model: LlamaForCausalLM, rows: torch.Tensor, batch_size: int, steps: int, bf16: bool) -> None:
    """The least that trains the same: no checkpoints, no records."""
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for batch in rows.split(batch_size)[:steps]:
        batch = batch.to(model.device, non_blocking=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def library_loop(model: LlamaForCausalLM, rows: torch.Tensor, batch_size: int, steps: int, bf16: bool) -> None:
    """`transformers.Trainer`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=model.device.type == "cpu",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        examples = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model, arguments, train_dataset=examples).train()


def tokens_per_second(loop, options: argparse.Namespace) -> float:
    """One loop, timed."""
    model = build_model(options.hidden_size, options.layers, options.device)
    rows = torch.randint(0, 1024, (options.batch_size * options.steps, options.seq_len))
    clock = time.process_time if options.cpu_time else time.perf_counter
    started = clock()
    loop(model, rows, options.batch_size, options.steps, options.bf16)
    if options.device == "cuda":
        torch.cuda.synchronize()
    return rows.numel() / (clock() - started)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {
        "rounds": 5,
        "steps": 40,
        "hidden_size": 256,
        "layers": 4,
        "batch_size": 32,
        "seq_len": 128,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    loops = {"bare loop": bare_loop, "this course": course_loop, "transformers.Trainer": library_loop}
    warm_up = argparse.Namespace(**vars(options) | {"steps": 3})
    for loop in loops.values():
        tokens_per_second(loop, warm_up)
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds):
        for name, loop in sorted(loops.items(), reverse=number % 2 == 1):  # nobody is always the first
            speeds[name].append(tokens_per_second(loop, options))
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:,.0f} tokens/s" for name, values in speeds.items())
        )
    for name in ("bare loop", "transformers.Trainer"):
        ratios = [ours / theirs for ours, theirs in zip(speeds["this course"], speeds[name], strict=True)]
        listed = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"this course / {name}: median {statistics.median(ratios):.3f} ({listed})")


if __name__ == "__main__":
    main()
