"""The subcommand that plans a training run before anything is bought or started."""

from typing import Annotated, Any

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="7B, 1B, or a checkpoint folder: FlexOlmo or OLMo-2.")] = "7B",
    gpus: Annotated[int, typer.Option(help="How many GPUs.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts in memory; the method trains one beside the public one.")] = 2,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    micro_batch: Annotated[int, typer.Option(help="Sequences on each GPU at a time.")] = 1,
    lora: Annotated[int, typer.Option(help="Rank of the expert's low-rank form; 0 trains all of it.")] = 0,
    strategy: Annotated[str, typer.Option(help="fsdp shares everything out; ddp repeats it on each GPU.")] = "fsdp",
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again instead of keeping them.")] = True,
    gpu_memory_gb: Annotated[float, typer.Option(help="Memory of one GPU, in 10^9 bytes.")] = 80.0,
    peak_flops: Annotated[float, typer.Option(help="Peak of one GPU in bf16, operations per second.")] = 989e12,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    frozen_bytes: Annotated[float, typer.Option(help="Bytes of a frozen parameter: 4 in fp32, 2 in bf16.")] = 4,
    optimizer_bytes: Annotated[float, typer.Option(help="Per trained parameter: 8 for AdamW, 2 for 8-bit.")] = 8,
    tokens: Annotated[float, typer.Option(help="Tokens to train on.")] = 50e9,
) -> None:
    """Say what training one expert takes: parameters, memory on each GPU, tokens per day."""
    assumptions = {name: value for name, value in locals().items() if name != "model"}
    with plain_errors():
        from flexolmo_hf import plan_training

        _show(plan_training(model, **assumptions), model)


def _show(found: Any, model: str) -> None:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    among, memory = found.assumptions, found.memory
    gpus = "1 GPU" if among.gpus == 1 else f"{among.gpus} GPUs, {among.strategy}"
    table = Table(title=f"{Path(model).name}: one of {among.experts} experts on {gpus}", title_justify="left")
    table.add_column("on each GPU")
    table.add_column("GB", justify="right")
    table.add_column("what")
    for name, size, what in (
        ("frozen parameters", memory.frozen, f"{found.frozen:,} of {among.frozen_bytes:g} bytes"),
        ("trained parameters", memory.trained, f"{found.trained:,} of {among.trained_bytes:g} bytes"),
        ("gradients", memory.gradients, f"{among.gradient_bytes:g} bytes for each trained one"),
        ("optimizer state", memory.optimizer, f"{among.optimizer_bytes:g} bytes for each trained one"),
        ("activations", memory.activations, _activations(among)),
        ("working copies", memory.working, "weights as they are computed with"),
        ("overhead", memory.overhead, "libraries and fragmentation"),
        ("total", memory.total, f"of {among.gpu_memory_gb:g} GB"),
    ):
        table.add_row(name, f"{size / 1e9:,.1f}", what)
    console = Console()
    console.print(table)
    for line in _sentences(found):
        console.print(line, soft_wrap=True, highlight=False)


def _activations(among: Any) -> str:
    kept = "checkpointed" if among.checkpointing else "all kept"
    return f"{among.micro_batch} x {among.sequence} tokens, {kept}"


def _sentences(found: Any) -> list[str]:
    among = found.assumptions
    received, what = found.communication
    lines = [
        f"Speed: {found.tokens_per_second:,.0f} tokens/s, {found.tokens_per_day / 1e9:.2f} B tokens per day, "
        f"{found.days:,.1f} days for {among.tokens / 1e9:g} B, at {among.utilisation:.0%} of "
        f"{among.peak_flops / 1e12:,.0f} TFLOP/s per GPU and {found.flops_per_token / 1e9:,.1f} GFLOP per token.",
        f"Each GPU receives {received / 1e9:,.1f} GB per micro-batch: {what}.",
    ]
    if found.fits:
        return [*lines, "It fits."]
    remedies = [f"{text} ({total / 1e9:,.1f} GB)" for text, total in found.remedies()]
    advice = f"What would: {'; '.join(remedies)}." if remedies else "No single change would make it fit."
    return [*lines, f"It does not fit. {advice}"]
