"""Trains a model: python main.py --config=NAME[:VARIANT] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...].

The same as `python -m castling_jax train`: --help shows the flags, which are defined in castling_jax/tools/train.py.
"""

from castling_jax.tools.train import main

if __name__ == "__main__":
    main()
