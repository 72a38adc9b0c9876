"""Checksums of sharded arrays, on eight forced host devices: python -m tests.training.checksum_shards."""

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from castling_jax.convert.checksums import checksums

SPECS = (P(), P("a"), P(("a", "b")), P("c", ("b", "a")), P(None, "b"), P(("b", "a", "c")))


def main() -> None:
    random = np.random.default_rng(0)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=3 * (kind,))
        for shape in ((), (8,), (8, 12), (16, 8, 6)):
            for dtype in (np.float32, ml_dtypes.bfloat16, np.bool_):
                array = random.integers(0, 2**7, shape).astype(dtype)
                for spec in SPECS:
                    if len(spec) <= len(shape):
                        sharded = jax.device_put(array, NamedSharding(mesh, spec))
                        with jax.set_mesh(mesh):  # as in training
                            assert checksums([sharded]) == checksums([array]), (kind, shape, dtype, spec)


if __name__ == "__main__":
    main()
