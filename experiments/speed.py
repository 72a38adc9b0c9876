"""Times the inference forms of the studies' models: python -m experiments.speed.

Run it on one core while nothing else runs, as `taskset -c 0 python -m experiments.speed`. It writes
experiments/results/speed.json.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import castling_jax
from castling_jax.bench.attention import describe_machine, find_versions
from castling_jax.bench.calls import time_group
from castling_jax.errors import check_at_least
from castling_jax.storage import write_atomically
from castling_jax.tools.cli import ending_in_a_sentence
from castling_jax.training.malloc import keep_freed_memory
from experiments.results import SPEED_FILE

PATCHES = {64: 4, 256: 2, 1024: 1}  # tokens -> patch size, of images of 32 pixels
# castling's inference form is linear_angular's, with the same taps.
ATTENTIONS = ("softmax", "softmax_taps", "linear_angular", "relu_linear_taps")
IMAGES = 32  # a call


def measure(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per image {min, median, max} of each attention and number of tokens.

    Args:
      repeats: calls of each model. The attentions are called in turns.

    Raises:
      InputError: repeats is below 1.
    """
    check_at_least("--repeats", repeats, 1)
    images = np.random.default_rng(0).normal(size=(IMAGES, 32, 32, 3)).astype(np.float32)
    rows = []
    for tokens, patch_size in (bar := tqdm(PATCHES.items(), unit="length")):
        bar.set_description(f"{tokens:,} tokens")
        calls: dict[str, Callable[[], object]] = {}
        for attention in ATTENTIONS:
            sizes: dict[str, Any] = {"num_classes": 10, "num_heads": 4, "image_size": 32, "patch_size": patch_size}
            model = castling_jax.create_model("deit_micro", attention=attention, form="inference", **sizes)
            run = jax.jit(functools.partial(castling_jax.apply, model))
            calls[attention] = functools.partial(run, castling_jax.get_variables(model), images)
        rows += [
            {"attention": row["name"], "tokens": tokens}
            | {"milliseconds": {name: value / IMAGES for name, value in row["milliseconds"].items()}}
            for row in time_group(calls, repeats)
        ]
    return rows


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="calls of each model (default 15)")
    repeats = parser.parse_args().repeats
    keep_freed_memory()
    found = {"machine": describe_machine(), "versions": find_versions(), "repeats": repeats, "rows": measure(repeats)}
    write_atomically(SPEED_FILE, json.dumps(found, indent=1).encode() + b"\n")
    print(f"written: {SPEED_FILE}.")


if __name__ == "__main__":
    main()
