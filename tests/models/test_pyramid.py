"""The simple feature pyramid against detectron2's golden file."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.models.pyramid import SimpleFeaturePyramid, simple_feature_pyramid
from castling_jax.models.variables import get_variables
from tests.models import small


def params_of(weights):
    """The tree of detectron2's arrays. Each level numbers its layers through; its last two are lateral and output."""

    def level(stage, doubles, lateral):
        def array(name):
            return jnp.asarray(weights[f"simfp_{stage}.{name}"])

        def norm(name):
            return {"scale": array(f"{name}.weight"), "bias": array(f"{name}.bias")}

        def convolution(number):
            return {"kernel": array(f"{number}.weight").transpose(2, 3, 1, 0)}

        return {
            "doubles": {
                str(i): {"kernel": array(f"{n}.weight").transpose(2, 3, 0, 1), "bias": array(f"{n}.bias")}
                for i, n in enumerate(doubles)
            },
            "norms": {str(i): norm(n + 1) for i, n in enumerate(doubles[:-1])},
            "lateral": convolution(lateral),
            "lateral_norm": norm(f"{lateral}.norm"),
            "output": convolution(lateral + 1),
            "output_norm": norm(f"{lateral + 1}.norm"),
        }

    levels = [level(2, (0, 3), 4), level(3, (0,), 1), level(4, (), 0), level(5, (), 1)]
    return {"levels": {str(i): params for i, params in enumerate(levels)}}


def test_golden_pyramid(golden):
    file = golden("dense/pyramid")
    params, x = params_of(file.group("weights")), jnp.asarray(file["input"].transpose(0, 2, 3, 1))
    names = ("p2", "p3", "p4", "p5")
    cotangents = [file[f"cotangent/{name}"].transpose(0, 2, 3, 1) for name in names]

    @jax.jit
    def run(params, x):
        maps, backward = jax.vjp(lambda x: simple_feature_pyramid(params, x, file.meta["scales"]), x)
        return maps, backward(cotangents)[0]

    maps, gradient = run(params, x)
    for name, actual in zip(names, maps, strict=True):
        np.testing.assert_allclose(actual, file[f"output/{name}"].transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    # The file's gradient, whose largest number is 19, lies 3e-5 from that in float64.
    np.testing.assert_allclose(gradient, file["grad/input"].transpose(0, 2, 3, 1), rtol=0, atol=3e-5)


def test_the_caller_chooses_the_scales():
    pyramid = nnx.eval_shape(lambda: SimpleFeaturePyramid(16, 8, (8, 2, 0.25), small.layers()))
    params = get_variables(pyramid)["params"]
    x = jax.ShapeDtypeStruct((2, 12, 8, 16), jnp.float32)
    maps = jax.eval_shape(lambda params, x: simple_feature_pyramid(params, x, (8, 2, 0.25)), params, x)
    assert [x.shape for x in maps] == [(2, 96, 64, 8), (2, 24, 16, 8), (2, 3, 2, 8)]
    kernels = params["levels"]["0"]["doubles"]
    assert [kernels[str(i)]["kernel"].shape for i in range(3)] == [(2, 2, 16, 8), (2, 2, 8, 4), (2, 2, 4, 2)]
