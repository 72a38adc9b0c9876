"""Downloads published softmax weights, and checks their SHA-256.

    python -m castling_jax fetch NAME [--out=DIR]

NAME is a model: deit_tiny, levit_256, mvitv2_base, or a distilled DeiT such as deit_base_distilled. The file is timm's
or the authors' own. The command prints how to start a castling model from it. There are no castling weights to fetch:
no castling model has been trained on ImageNet yet.

example:
  python -m castling_jax fetch deit_small --out=weights
"""

from argparse import Namespace

from castling_jax.tools.cli import Parser, command, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="the model's name")
    parser.add_argument("--out", metavar="DIR", type=local_path, default=".", help="the folder for the file")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
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
