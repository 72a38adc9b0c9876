"""Gets published softmax weights, and checks them by their SHA-256.

    python -m castling_jax fetch NAME [--out=DIR]

NAME is a model: deit_tiny, levit_256, mvitv2_base, or a distilled DeiT such as deit_base_distilled. The file is timm's
or the authors' own. It prints the command that starts a castling model from it. There are no castling weights to fetch:
none has been trained on ImageNet.

example:
  python -m castling_jax fetch deit_small --out=weights
"""

from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="of the model")
    parser.add_argument("--out", metavar="DIR", type=local_path, default=".", help="where to put the file")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    from castling_jax.convert.fetch import fetch

    path = fetch(options.name, options.out)
    model = options.name.removesuffix("_distilled")
    print(
        f"{path}\nTo start from it, on images of your own:\n"
        f"  python main.py --config=folder:224,{model} --config.dataset.name=folder:PATH --config.init_from={path}"
        + (" --config.model.distilled" if model.startswith("levit") or model != options.name else "")
    )


if __name__ == "__main__":
    main()
