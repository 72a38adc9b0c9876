"""Loss functions: one value for each example."""

import jax
import optax
from jaxtyping import Array, Float

DISTILLATIONS = ("hard", "soft")


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, "batch"]:
    """Softmax cross entropy in nats; the targets are shares of the classes that sum to 1."""
    return optax.softmax_cross_entropy(logits, targets)


def distillation_loss(
    logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    kind: str,
    temperature: float,
) -> Float[Array, "batch"]:
    """How far a student is from its teacher (Touvron et al., DeiT, section 4).

    Args:
      logits: the student's logits.
      teacher_logits: the teacher's logits.
      kind: "hard", the cross entropy with the teacher's decision (equation 3); or "soft", temperature^2 times the
        Kullback-Leibler divergence of the two softmaxes at that temperature (equation 2). DeiT's code also divides the
        soft loss by the number of classes; the paper does not, and neither do we.
      temperature: temperature of the soft loss's softmaxes.
    """
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(logits, teacher_logits.argmax(-1))
    student, teacher = (jax.nn.log_softmax(values / temperature) for values in (logits, teacher_logits))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)
