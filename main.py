"""Trains a model: python main.py --config=NAME[:VARIANT] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...].

It is `python -m castling_jax train`, whose --help this is; the flags are in castling_jax/tools/train.py.
"""

from castling_jax.tools.train import main

if __name__ == "__main__":
    main()
