"""Trains several attentions side by side, and says what each has reached and what it costs.

    python -m castling_jax.tools.compare --config=configs/fashion_mnist.py [--attentions=castling,softmax]
        [--epochs=N] [--workdir=runs/compare-fashion_mnist]

trains the configuration once for each attention, all else being equal, prints held-out accuracy beside parameters and
multiply-accumulates (MACs) of what is run in the end, and writes the table to WORKDIR/compare.md. Each run is one of
main.py's in a folder of its own, WORKDIR/ATTENTION: started again, the command goes on where it was.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from castling_jax.errors import check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.storage import try_file, write_atomically
from castling_jax.tools.folders import any_path, ending_in_a_sentence
from castling_jax.tools.memory import keep_freed_memory
from castling_jax.training.config_files import load_config
from castling_jax.training.preemption import Preempted
from castling_jax.training.run import run

TABLE_FILE = "compare.md"


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
    rows = [
        f"| {attention} | {100 * found['accuracy_inference_form']:.2f} % | {found['eval_loss']:.4f} | "
        f"{found['parameters_inference_form']:,} | {found['macs_inference_form'] / 1e6:,.2f} M | "
        f"{found['macs_train_form'] / 1e6:,.2f} M | {found['steps']:,} | {found['train_seconds']:.0f} s |"
        for attention, found in summaries.items()
    ]
    head = "| attention | held-out accuracy | loss (nats) | parameters | MACs an image | in training | steps | time |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows, ""])


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    parser.add_argument("--attentions", default="castling,softmax", help="by commas (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="instead of the configuration's")
    parser.add_argument("--workdir", type=any_path, help="by default runs/compare- and the configuration's name")
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    try:
        config = load_config(options.config)
        attentions = options.attentions.split(",")
        for attention in attentions:
            check_known("attention", attention, KINDS)
        if options.epochs is not None:
            config.train.epochs = options.epochs
        workdir = options.workdir or epath.Path("runs") / f"compare-{Path(options.config.partition(':')[0]).stem}"
        try_file(workdir / TABLE_FILE)
        page = table(compare(config, attentions, workdir))
        write_atomically(workdir / TABLE_FILE, page.encode())
    except Preempted as preempted:
        sys.exit(f"interrupted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, if there is one.")
    print(page)


if __name__ == "__main__":
    main()
