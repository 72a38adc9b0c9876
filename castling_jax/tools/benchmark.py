"""Speed of the attention against softmax, on the machine at hand.

    python -m castling_jax benchmark [--backward] [--models] [--attentions=NAMES] [--out=DIR]

times one attention layer with its projections (float32) over growing numbers of tokens: castling in its inference and
its training form, and softmax, which is jax.nn.dot_product_attention. Where they are installed (pip install torch timm
equimo), PyTorch's softmax attention, the castling block in plain PyTorch and Equimo's castling layer join the run.
Calls take turns, so that whatever else the machine does falls on all of them alike: read the ratios to softmax, whose
range over the repeats is printed too, rather than the milliseconds. The batch falls as the tokens grow, so that one
call has about 2,048 tokens, and where one sequence is longer, that one. --attentions=window,bridge adds layers of other
attentions (and with --models, models); tokens stand on the largest square grid, and those left over stand before it.
It writes DIR/benchmark.json (every figure, the machine, versions) and DIR/benchmark.png (time over tokens).
--models times a whole model too, castling in both forms: --models --model=deit_micro --image-sizes=8,64,128.
On two CPU cores it takes some five minutes, and with --backward and --models twenty.

    python -m castling_jax benchmark --loader [--out=DIR]

times the reading of training images instead, JPEGs to random crops, on one core, beside Pillow decoding whole images
and, where it is installed, TensorFlow decoding crops (pip install tensorflow-cpu). It writes DIR/benchmark.json alone.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from castling_jax.errors import InputError, check_at_least
from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path

TOKENS = "49,197,577,1024,4096,16384"


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", default=TOKENS, help=f"sequence lengths, with commas ({TOKENS})")
    parser.add_argument("--channels", type=int, default=384, help="width of the layer (384, as DeiT-S)")
    parser.add_argument("--heads", type=int, default=6, help="heads (6)")
    parser.add_argument("--repeats", type=int, default=11, help="timed calls of each (11)")
    parser.add_argument("--attentions", default="", help="other attentions to time, with commas, such as window,bridge")
    parser.add_argument("--backward", action="store_true", help="time the gradients of weights and input too")
    parser.add_argument("--models", action="store_true", help="time whole models too, forward")
    parser.add_argument("--model", default="deit_tiny", help="which model (deit_tiny)")
    parser.add_argument("--image-sizes", default="224,384,512", help="its image sizes (224,384,512)")
    parser.add_argument(
        "--keep-memory", action="store_true", help="have malloc keep what is freed (Linux): half the time of long calls"
    )
    parser.add_argument("--loader", action="store_true", help="time the reading of images instead")
    parser.add_argument("--no-peers", action="store_true", help="leave out PyTorch, timm and Equimo")
    parser.add_argument(
        "--max-score-gib",
        type=float,
        default=1.0,
        help="leave out softmax and training forms where one copy of a call's scores is over this (1 GiB)",
    )
    parser.add_argument("--out", type=local_path, default=Path("runs/benchmark"), help="folder (runs/benchmark)")
    return parser


def parse_counts(flag: str, text: str) -> list[int]:
    """ "49,197" -> [49, 197].

    Raises:
      InputError: it is no list of whole numbers of at least 1.
    """
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) for item in items):
        raise InputError(f"{flag} takes whole numbers of at least 1 with commas between them, not {text!r}.")
    return sorted({int(item) for item in items})


def parse_arguments(words: Sequence[str] | None) -> Namespace:
    """The command line, checked.

    Raises:
      InputError: a number is out of range.
    """
    parsed = make_parser().read(words)
    parsed.tokens = parse_counts("--tokens", parsed.tokens)
    parsed.attentions = [name for name in parsed.attentions.split(",") if name]
    parsed.image_sizes = parse_counts("--image-sizes", parsed.image_sizes)
    for name in ("channels", "heads", "repeats"):
        check_at_least(f"--{name}", getattr(parsed, name), 1)
    return parsed


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(words)

    from castling_jax.bench.attention import JSON_FILE, PICTURE_FILE, describe, run

    results = run(parsed)
    print(describe(results))
    print(f"\n{parsed.out / JSON_FILE}")
    if results["layers"]:
        print(parsed.out / PICTURE_FILE)


if __name__ == "__main__":
    main()
