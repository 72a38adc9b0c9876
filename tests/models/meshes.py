"""Models on meshes of four forced host devices beside one device: python -m tests.models.meshes CASE FAMILY.

Prints JSON, {what: {mesh: largest difference}}; `run_case` starts it, in a process of its own, and reads that.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile

MESHES = {  # name -> (axis types of data and fsdp, whether jax.set_mesh is used)
    "explicit": ("Explicit", "Explicit", True),
    "explicit, not set": ("Explicit", "Explicit", False),
    "mixed": ("Explicit", "Auto", True),
    "mixed the other way, not set": ("Auto", "Explicit", False),
    "auto": ("Auto", "Auto", True),
}


FEW = ("explicit", "mixed the other way, not set")
ALIKE = ("explicit", "explicit, not set", "auto")  # one program, as far as the compiler sees


def meshes_of(family: str, what: str) -> tuple[str, ...]:
    """The meshes of a case. One decorator makes all axes Auto, whatever the model: DeiT runs on all of them, and each
    other family on both of FEW, but not with every function."""
    if family == "deit":
        return tuple(MESHES) if what in ("castling", "around") else FEW
    return FEW[1:] if what in ("castling", "apply") else FEW[:1]


def run_case(*name: str) -> dict:
    """What a case finds."""
    return json.loads(run_on_devices(4, "tests.models.meshes", *name))


def run_on_devices(count: int, module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints, with so many devices forced upon the CPU."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def make_mesh(name):
    import jax

    if name.startswith("explicit"):
        return jax.make_mesh((2, 2), ("data", "fsdp"))  # as a notebook writes it
    return jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=tuple(jax.sharding.AxisType[k] for k in MESHES[name][:2]))


def in_use(name, mesh):
    import jax

    return jax.set_mesh(mesh) if MESHES[name][2] else contextlib.nullcontext()


def on_mesh(variables, images, mesh):
    """Images split over both axes, and every array whose last axis is even split along it over fsdp."""
    import jax

    def place(leaf):
        split = leaf.ndim and leaf.shape[-1] % 2 == 0
        spec = jax.P(*(None,) * (leaf.ndim - 1), "fsdp") if split else jax.P()
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    images = jax.device_put(images, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    return jax.tree.map(place, variables), images


def difference(actual, expected):
    """The largest one of the trees' leaves, relative to a leaf's largest number, or to 1."""
    import jax
    import numpy as np

    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def of_leaf(one, other):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert one.shape == other.shape
        return float(np.abs(one - other).max() / max(1, np.abs(other).max())) if other.size else 0.0

    return max(map(of_leaf, jax.tree.leaves(actual), jax.tree.leaves(expected)), default=0.0)


def family(name, **arguments):
    from tests.models import small

    if name == "picodet":
        return detector()
    make = {"deit": small.small_model, "levit": small.small_levit, "mvitv2": small.small_mvit}[name]
    sizes = {"deit": {"num_heads": 2}, "levit": {"image_size": 48}, "mvitv2": {"depths": (1, 1, 1)}}[name]
    model = make(**(sizes | arguments))
    size = model.spec.image_size
    return model, small.random_variables(model), small.random_images(batch=4, height=size, width=size)


def detector():
    """A small PicoDet, with the neck and the backbone that compile fastest."""
    from castling_jax.models.registry import abstract_model
    from tests.models import small

    model = abstract_model(
        "picodet_s",
        backbone="deit_micro",
        backbone_arguments={"patch_size": 16, "embed_dim": 16, "depth": 1},
        neck="csp_pan",
        **{"neck_channels": 16, "num_convs": 1, "num_classes": 4, "image_size": 160},
    )
    return model, small.random_variables(model), small.random_images(batch=4, height=160, width=160)


def detect(name):
    """A detector's scores, box bins and boxes in training and in evaluation."""
    import jax

    import castling_jax
    from castling_jax.models.variables import forward_train

    model, variables, images = family(name)
    functions = {
        "apply": lambda v, x: castling_jax.apply(model, v, x, mask_threshold=0.05),
        "forward_train": lambda v, x: forward_train(model, v, x, mask_threshold=0.05, key=jax.random.key(0)),
    }
    found: dict[str, dict[str, float]] = {}
    for what, function in functions.items():
        found |= compare({what: function}, variables, images, meshes_of(name, what))
    return found


def compare(functions, variables, images, meshes):
    """{function: {mesh: difference from one device}}, and that results are split as the images are."""
    import jax

    found = {}
    for what, function in functions.items():
        expected = jax.jit(function)(variables, images)
        found[what] = {}
        for name in meshes:
            mesh = make_mesh(name)
            with in_use(name, mesh):
                found[what][name] = difference(jax.jit(function)(*on_mesh(variables, images, mesh)), expected)
    return found


def forward(name):
    """`apply` with its gradients of all kinds of attention, in both dtypes and by both implementations."""
    import jax
    import jax.numpy as jnp

    import castling_jax

    kinds = ("castling", "linear_angular", "softmax", "angular") if name == "deit" else ("castling",)
    variants = {
        **{kind: {"attention": kind} for kind in kinds},
        "bfloat16": {"dtype": "bfloat16"},
        **({"pallas": {"implementation": "pallas"}} if name == "deit" else {}),
    }
    found = {}
    for variant, arguments in variants.items():
        model, variables, images = family(name, **arguments)

        def run(variables, images, model=model):
            def total(variables, images):
                logits, densities = castling_jax.apply(
                    model, variables, images, mask_threshold=0.05, return_densities=True
                )
                return jnp.sum(jnp.sin(logits)), (logits, densities)

            gradients, outputs = jax.grad(total, argnums=(0, 1), has_aux=True)(variables, images)
            return outputs if model.spec.dtype == "bfloat16" else (outputs, gradients)

        found |= compare({variant: run}, variables, images, meshes_of(name, variant))
    return found


def around(name):
    """All that goes with `apply`: features, training mode, the switch and its check."""
    import jax
    import numpy as np

    import castling_jax
    from castling_jax.convert.inference_folder import save_inference
    from castling_jax.models.registry import abstract_model
    from castling_jax.models.variables import features, forward_train

    model, variables, images = family(name)
    key = jax.random.key(0)
    functions = {
        "features": lambda v, x: features(model, v, x, mask_threshold=0.05),
        "forward_train": lambda v, x: forward_train(model, v, x, mask_threshold=0.05, key=key),
        "to_inference": lambda v, x: castling_jax.to_inference(v),
        "vmap": lambda v, x: jax.vmap(lambda row: castling_jax.apply(model, v, row[None], mask_threshold=0.05))(x),
    }
    meshes = meshes_of(name, "around")
    found = compare(functions, variables, images, meshes)
    expected = castling_jax.check_switch(model, variables, images, 0.05)
    switched = castling_jax.to_inference(variables)
    inference_model = abstract_model(**model.spec.arguments(form="inference"))
    inference_logits = jax.jit(castling_jax.apply, static_argnums=0)(inference_model, switched, images)
    found |= {"check_switch": {}, "eager to_inference": {}, "layout": {}, "load_inference": {}}
    for name in meshes:
        mesh = make_mesh(name)
        placed, rows = on_mesh(variables, images, mesh)
        with in_use(name, mesh):
            found["check_switch"][name] = difference(castling_jax.check_switch(model, placed, rows, 0.05), expected)
            moved = castling_jax.to_inference(placed)
            found["eager to_inference"][name] = difference(moved, switched)
            # A convolution or a linear layer that is folded stays where it was.
            wrong = [
                leaf.sharding
                for leaf in jax.tree.leaves(moved)
                if leaf.shape[-1] % 2 == 0 and leaf.ndim > 1 and leaf.sharding.spec[-1] != "fsdp"
            ]
            logits, densities = jax.jit(
                lambda v, x: castling_jax.apply(model, v, x, mask_threshold=0.05, return_densities=True)
            )(placed, rows)
            if name.startswith("explicit"):
                wrong += [logits.sharding] * (logits.sharding.spec[0] != ("data", "fsdp"))
                wrong += [densities.sharding] * (not densities.sharding.is_fully_replicated)
            found["layout"][name] = len(wrong)
            with tempfile.TemporaryDirectory() as folder:
                save_inference(folder, model, jax.tree.map(np.asarray, variables))
                loaded, its_variables = castling_jax.load_inference(folder)
            run = jax.jit(castling_jax.apply, static_argnums=0)
            found["load_inference"][name] = difference(run(loaded, its_variables, rows), inference_logits)
    return found


def own_loop(family_name):
    """Three steps of a loop of one's own, with Optax: parameters and batch statistics, relative to one device's."""
    import jax
    import jax.numpy as jnp
    import optax

    from castling_jax.models.variables import forward_train

    model, variables, images = family(family_name)
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(variables, opt_state, images, labels, key):
        def loss(params):
            logits, _, batch_stats = forward_train(
                model, variables | {"params": params}, images, mask_threshold=0.05, key=key
            )
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits[0], labels).mean(), batch_stats

        (_, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {}), opt_state

    def train(variables, images, labels):
        opt_state = optimizer.init(variables["params"])
        for number in range(3):
            variables, opt_state = step(variables, opt_state, images, labels, jax.random.key(number))
        return variables

    labels = jnp.arange(4) % 7
    expected = train(variables, images, labels)
    found = {}
    for name in ALIKE if family_name == "deit" else ALIKE[::2]:
        mesh = make_mesh(name)
        with in_use(name, mesh):
            placed, rows = on_mesh(variables, images, mesh)
            found[name] = difference(
                train(placed, rows, jax.device_put(labels, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))), expected
            )
    return {"own_loop": found}


def replicated(name):
    """Gradients where the images are split over `data` alone, and nothing over `model`; shares of each array's norm."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    import castling_jax
    from castling_jax.ops.depthwise import convolve_channels

    if name == "convolution":
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(4, 7, 8, 6)).astype("f"), rng.normal(size=(3, 5, 1, 6)).astype("f")

        def total(kernel, x):
            return sum(jnp.sum(jnp.sin(convolve_channels(x, kernel, strides))) for strides in ((1, 1), (2, 3)))

        variables, images = kernel, x
    else:
        model, variables, images = family(name, **({"attention": "convolutional"} if name == "deit" else {}))

        def total(variables, images):
            outputs = castling_jax.apply(model, variables, images, mask_threshold=0.05)
            if name == "picodet":
                outputs = (outputs["scores"], outputs["boxes"] / 160)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    expected = jax.jit(jax.grad(total))(variables, images)
    found = {}
    # Inside of `apply` all axes are Auto; the larger models are compiled once for that.
    for kind in (AxisType.Auto, AxisType.Explicit) if name in ("convolution", "deit") else (AxisType.Explicit,):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
        placed = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
        rows = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
        shares = jax.tree.map(
            lambda one, other: float(np.linalg.norm(one - other) / np.linalg.norm(other)) if np.any(other) else 0.0,
            jax.device_get(jax.jit(jax.grad(total))(placed, rows)),
            jax.device_get(expected),
        )
        found[kind.name] = max(jax.tree.leaves(shares))
    return {"replicated": found}


CASES = {"detect": detect, "forward": forward, "around": around, "own_loop": own_loop, "replicated": replicated}

if __name__ == "__main__":
    case, of = sys.argv[1:]
    print(json.dumps(CASES[case](of)))
