"""Prints a model's parts and its cost.

    python -m castling_jax describe                  all models, as softmax and as castling models
    python -m castling_jax describe deit_tiny        one model

For one model it prints three tables:
1. parameters, MACs and activations with every attention in both forms;
2. MACs and activations part by part, with --attention and --form (castling, train);
3. parameters module by module, with the same.

    python -m castling_jax describe levit_256 --form inference --set distilled=True
    python -m castling_jax describe mvitv2_base --attention softmax --image_size 384 --num_classes 21841

MACs are multiply-accumulates of one image's forward pass: matrix products, the attention's own among them, convolutions
and taps; norms, softmax and the like are not counted. Activations are the results of these operations. Both are counted
in the traced program, which is not run, so a model of any size takes seconds.
"""

from argparse import Namespace

from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("name", nargs="?", help="a model's name; without it all are listed")
    parser.add_argument("--attention", default="castling", help="the attention in the second and third table")
    parser.add_argument("--form", default="train", help="the form in the second and third table: train or inference")
    parser.add_argument("--image_size", type=int, help="pixels a side; the model's own if not given")
    parser.add_argument("--num_classes", type=int, help="number of classes; the model's own if not given")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='another argument of create_model, such as token_conv=2d or "embed_dim=(128, 256, 384)"; may be repeated',
    )
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.models.description import describe, describe_all, parse_overrides
    from castling_jax.models.registry import MODELS, abstract_model

    arguments = vars(options)
    changed = [word for word, value in arguments.items() if value != make_parser().get_default(word)]
    settings = arguments.pop("set")
    if options.name is not None:
        print(describe(abstract_model(**arguments | parse_overrides(settings))))
        return
    if changed:
        raise InputError(f"--{changed[0]} needs one model: give its name, one of {', '.join(MODELS)}.")
    for line in describe_all():  # a line a second: each is printed as soon as it is known
        print(line, flush=True)


if __name__ == "__main__":
    main()
