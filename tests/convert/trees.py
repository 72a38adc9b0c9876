"""A parameter tree with everything the switch has to see to: a branch, batch norms in both orders, two heads."""

import numpy as np


def batch_norm(rng, features):
    parameters = {"scale": 1 + 0.3 * rng.normal(size=features), "bias": rng.normal(size=features)}
    return parameters, {"mean": rng.normal(size=features), "var": rng.uniform(0.2, 3, features)}


def levit_like(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    stem, stem_stats = batch_norm(rng, 4)
    qkv, qkv_stats = batch_norm(rng, 6)
    head, head_stats = batch_norm(rng, 6)
    second, second_stats = batch_norm(rng, 6)
    params = {
        "stem": {"linear": {"kernel": rng.normal(size=(3, 3, 2, 4))}, "bn": stem},
        "blocks": {
            "0": {
                "attn": {
                    "qkv": {"linear": {"kernel": rng.normal(size=(4, 6))}, "bn": qkv},
                    "token_kernel": rng.normal(size=(3, 3, 2)),
                    "softmax_branch": {"attention_biases": rng.normal(size=(2, 16))},
                }
            }
        },
        "head": {"bn": head, "linear": {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)}},
        "head_dist": {"bn": second, "linear": {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)}},
    }
    batch_stats = {
        "stem": {"bn": stem_stats},
        "blocks": {"0": {"attn": {"qkv": {"bn": qkv_stats}}}},
        "head": {"bn": head_stats},
        "head_dist": {"bn": second_stats},
    }
    return as_dtype({"params": params, "batch_stats": batch_stats}, dtype)


def as_dtype(tree, dtype):
    return (
        {key: as_dtype(child, dtype) for key, child in tree.items()} if isinstance(tree, dict) else tree.astype(dtype)
    )


def folded_by_hand(variables):
    """`levit_like` after the switch, in float64 and written out."""
    params, stats = as_dtype(variables["params"], np.float64), as_dtype(variables["batch_stats"], np.float64)

    def gain_and_shift(norm, statistics):
        gain = norm["scale"] / np.sqrt(statistics["var"] + 1e-5)
        return gain, norm["bias"] - gain * statistics["mean"]

    def after(node, statistics):
        gain, shift = gain_and_shift(node["bn"], statistics["bn"])
        return {"linear": {"kernel": node["linear"]["kernel"] * gain, "bias": shift}}

    def before(node, statistics):
        gain, shift = gain_and_shift(node["bn"], statistics["bn"])
        kernel, bias = node["linear"]["kernel"], node["linear"]["bias"]
        return {"kernel": gain[:, None] * kernel, "bias": bias + shift @ kernel}

    attention, attention_stats = params["blocks"]["0"]["attn"], stats["blocks"]["0"]["attn"]
    heads = [before(params[name], stats[name]) for name in ("head", "head_dist")]
    return {
        "params": {
            "stem": after(params["stem"], stats["stem"]),
            "blocks": {
                "0": {
                    "attn": {
                        "qkv": after(attention["qkv"], attention_stats["qkv"]),
                        "token_kernel": attention["token_kernel"],
                    }
                }
            },
            "head": {"linear": {name: (heads[0][name] + heads[1][name]) / 2 for name in ("kernel", "bias")}},
        }
    }
