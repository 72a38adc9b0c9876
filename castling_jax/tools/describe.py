"""What a model is made of, and what it costs.

    python -m castling_jax describe                  all models, as softmax and as castling models
    python -m castling_jax describe deit_tiny        one model

Of one model it shows three tables:
1. parameters, MACs and activations with every attention in both forms;
2. where the MACs and activations go, part by part, of the attention and form chosen (castling, train);
3. where the parameters are, module by module, of the same.

    python -m castling_jax describe levit_256 --form inference --set distilled=True
    python -m castling_jax describe mvitv2_base --attention softmax --image_size 384 --num_classes 21841

MACs are multiply-accumulates of one image's forward pass: matrix products, the attention's own among them, convolutions
and taps; norms, softmax and the like are not counted. Activations are the numbers that these operations give out.
Both are counted in the traced program, which is not run, so a model of any size is described in seconds.
"""

from collections.abc import Sequence

from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("name", nargs="?", help="a model's name; without it all are listed")
    parser.add_argument("--attention", default="castling", help="of the second and third table (default: castling)")
    parser.add_argument("--form", default="train", help="of the second and third table: train or inference")
    parser.add_argument("--image_size", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--num_classes", type=int, default=1000, help="logits (default: 1000)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='another argument of create_model, such as token_conv=2d or "embed_dim=(128, 256, 384)"; may be repeated',
    )
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = vars(parser.read(words))
    given = [word for word, value in options.items() if value != parser.get_default(word)]

    from castling_jax.models.description import describe, describe_all, parse_overrides
    from castling_jax.models.registry import MODELS, abstract_model

    settings = options.pop("set")
    if options["name"] is None and given:
        raise InputError(f"--{given[0]} is of one model: give its name, one of {', '.join(MODELS)}.")
    if options["name"] is None:
        for line in describe_all():
            print(line, flush=True)
    else:
        print(describe(abstract_model(**options | parse_overrides(settings))))


if __name__ == "__main__":
    main()
