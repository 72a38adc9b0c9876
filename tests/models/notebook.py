"""What a notebook of today does on two devices, with the mesh that jax.make_mesh makes: castling_jax must just work.

python -m tests.models.notebook MODEL [FIELD=NUMBERS ...], on two (forced host) devices.
"""

import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import optax

import castling_jax
from castling_jax.convert.inference_folder import save_inference
from castling_jax.models.variables import forward_train

name, *overrides = sys.argv[1:]
model = castling_jax.create_model(
    name, num_classes=3, **{k: json.loads(v) for k, v in (o.split("=") for o in overrides)}
)
shape = (4, model.spec.image_size, model.spec.image_size, 3)

mesh = jax.make_mesh((2,), ("data",))
rows, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
variables = jax.device_put(castling_jax.get_variables(model), everywhere)
images = jax.device_put(jax.random.normal(jax.random.key(0), shape), rows)
labels = jax.device_put(jnp.arange(4) % 3, rows)

# apply, on the mesh of the arrays, and on that of set_mesh; with new variables, which lie on no mesh, too.
logits = castling_jax.apply(model, variables, images, mask_threshold=0.02)
with jax.set_mesh(mesh):
    again = castling_jax.apply(model, variables, images, mask_threshold=0.02)
    unplaced = castling_jax.apply(model, castling_jax.get_variables(model), images, mask_threshold=0.02)
assert logits.sharding.spec == again.sharding.spec == jax.P("data", None)
assert jnp.array_equal(logits, again)
assert jnp.array_equal(logits, unplaced)


# A loop of one's own.
def loss(params, batch_stats, key):
    variables = {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
    logits, _, batch_stats = forward_train(model, variables, images, mask_threshold=0.02, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits.mean(0), labels).mean(), batch_stats


params, batch_stats = variables["params"], variables.get("batch_stats", {})
optimizer = optax.adam(1e-3)
opt_state = optimizer.init(params)
grad, losses = jax.jit(jax.value_and_grad(loss, has_aux=True)), []
for key in jax.random.split(jax.random.key(1), 3):
    (value, batch_stats), gradients = grad(params, batch_stats, key)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    losses.append(float(value))
assert losses[2] < losses[0], losses

# The switch, and the way to a file and back.
variables = {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
switched = castling_jax.to_inference(variables)
with tempfile.TemporaryDirectory() as folder:
    save_inference(folder, model, variables)
    loaded, its_variables = castling_jax.load_inference(folder)
trained = castling_jax.apply(model, variables, images, mask_threshold=1.0)
with jax.set_mesh(mesh):
    logits = castling_jax.apply(loaded, switched, images)
    from_file = castling_jax.apply(loaded, its_variables, images)
# Float32's rounding, after batch norm is folded, in logits around 1.
assert jnp.allclose(trained, logits, rtol=0, atol=1e-5)
assert jnp.array_equal(logits, from_file)
