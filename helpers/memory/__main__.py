"""The memory of a model on the command line: `python -m helpers.memory Qwen/Qwen2.5-7B --method qlora --gpu T4`."""

import argparse
import json
from dataclasses import asdict

from helpers.errors import exit_cleanly
from helpers.memory.advice import recommend
from helpers.memory.choices import CACHE_BITS, METHODS, OPTIMIZERS, PRECISIONS, QUANTISATIONS
from helpers.memory.estimate import Estimate, estimate_inference, estimate_training
from helpers.memory.gpus import GIB, GPU, GPUS
from helpers.memory.shape import ModelShape


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 if it fits or no GPU was named, 1 if it does not."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.memory", description="GPU memory of training or running a decoder-only model, in GiB."
    )
    parser.add_argument("model", help="a bundled name such as Qwen/Qwen2.5-7B, a folder, or a hub id")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--inference", action="store_true", help="generation instead of training")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", "--context-len", type=int, default=2048, help="tokens in a row (default 2048)")
    parser.add_argument("--precision", help=f"one of {', '.join(PRECISIONS)}")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--json", action="store_true", help="everything in bytes as JSON")
    training = parser.add_argument_group("training")
    training.add_argument("--method", default="full", help=", ".join(METHODS))
    training.add_argument("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    training.add_argument("--checkpointing", action="store_true", help="keep only the layers' inputs")
    training.add_argument("--lora-rank", type=int, default=16)
    training.add_argument("--zero-stage", type=int, default=0)
    training.add_argument("--num-gpus", type=int, default=1)
    inference = parser.add_argument_group("inference")
    inference.add_argument("--quantization", help=", ".join(QUANTISATIONS))
    inference.add_argument("--cache-precision", help=", ".join(CACHE_BITS))
    options = parser.parse_args(arguments)

    gpu = GPUS[options.gpu] if options.gpu else None
    shape = ModelShape.from_config(options.model)
    common = {"batch_size": options.batch_size, "attention": options.attention}
    advice = None
    if options.inference:
        estimate = estimate_inference(
            shape,
            precision=options.precision or "fp16",
            context_len=options.seq_len,
            quantization=options.quantization,
            cache_precision=options.cache_precision,
            **common,
        )
    else:
        capable = gpu is None or gpu.compute_capability is None or gpu.compute_capability >= (8, 0)
        settings = common | {
            "precision": options.precision or ("bf16" if capable else "fp16"),
            "seq_len": options.seq_len,
            "method": options.method,
            "optimizer": options.optimizer,
            "gradient_checkpointing": options.checkpointing,
            "lora_rank": options.lora_rank,
            "zero_stage": options.zero_stage,
            "num_gpus": options.num_gpus,
        }
        estimate = estimate_training(shape, **settings)
        if gpu and not estimate.fits(gpu):
            advice = recommend(shape, gpu, **settings)
    fits = estimate.fits(gpu) if gpu else None
    if options.json:
        print(json.dumps(estimate.to_dict() | {"gpu": gpu and asdict(gpu), "fits": fits}, indent=1))
    else:
        _print_table(estimate, gpu, fits)
        if advice:
            print(advice)
    return 1 if fits is False else 0


def _print_table(estimate: Estimate, gpu: GPU | None, fits: bool | None) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = estimate.shape
    table = Table(title=f"{shape.name}, {shape.num_parameters / 1e9:.2f} B parameters: GiB (2^30 bytes) on each GPU")
    table.add_column("part")
    for phase in estimate.phases:
        table.add_column(f"{phase} (peak)" if phase == estimate.phase else phase, justify="right")
    for part in estimate.parts:
        table.add_row(part, *(f"{parts[part] / GIB:.2f}" for parts in estimate.phases.values()))
    table.add_section()
    table.add_row("total", *(f"{sum(parts.values()) / GIB:.2f}" for parts in estimate.phases.values()), style="bold")
    console = Console()
    console.print(table)
    console.print(f"CUDA context and fragmentation, a rule of thumb: {estimate.overhead / GIB:.2f} GiB more.")
    if estimate.host:
        console.print(f"Paged optimiser state in main memory: {estimate.host / GIB:.2f} GiB.")
    if gpu:
        verdict = "fits" if fits else "does not fit"
        console.print(f"It {verdict} in the {gpu.memory / GIB:.1f} GiB of a {gpu.name}.")


if __name__ == "__main__":
    exit_cleanly(main)
