"""Several attentions trained side by side, and the table of what each has reached and costs."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from castling_jax.models.attention.kinds import KINDS
from castling_jax.tables import markdown
from castling_jax.tasks.registry import task_in
from castling_jax.training.run import run

TABLE_FILE = "compare.md"
COLUMNS = "loss (nats)", "parameters", "MACs an image", "in training", "steps", "time"


def compare(config: ConfigDict, attentions: list[str], workdir: epath.Path) -> dict[str, dict[str, Any]]:
    """Trains, or goes on with, a run of each attention; the figures of their summaries."""
    figures = {}
    for attention in attentions:
        print(f"{attention}: {workdir / attention}", flush=True)
        own = config.copy_and_resolve_references()
        own.model.attention = attention
        if not KINDS[attention].takes("mask_kind"):
            own.mask.kind = "threshold"  # a fade is castling's, which the others are compared with
        figures[attention] = run(own, workdir / attention).figures
    return figures


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Accuracy beside cost, in Markdown; of the form that is run in the end."""
    measure = task_in(next(iter(summaries.values()), {})).measures[0]
    rows = [
        (
            attention,
            measure.text(figures[measure.best]),
            f"{figures['eval_loss']:.4f}" if "eval_loss" in figures else "",
            f"{figures['parameters_inference_form']:,}",
            f"{figures['macs_inference_form'] / 1e6:,.2f} M",
            f"{figures['macs_train_form'] / 1e6:,.2f} M",
            f"{figures['steps']:,}",
            f"{figures['train_seconds']:.0f} s",
        )
        for attention, figures in summaries.items()
    ]
    return "\n".join([*markdown(("attention", measure.title, *COLUMNS), rows), ""])
