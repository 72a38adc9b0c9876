"""Trains several attentions in turn, and tabulates the accuracy and the cost of each."""

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
    """Trains or resumes a run of each attention; returns attention -> figures of its summary."""
    figures = {}
    for attention in attentions:
        print(f"{attention}: {workdir / attention}", flush=True)
        run_config = config.copy_and_resolve_references()
        run_config.model.attention = attention
        if not KINDS[attention].takes("mask_kind"):
            run_config.mask.kind = "threshold"  # only castling has a fade, and the others would refuse it
        figures[attention] = run(run_config, workdir / attention).figures
    return figures


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the inference forms' accuracy and cost, with the training form's MACs."""
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
