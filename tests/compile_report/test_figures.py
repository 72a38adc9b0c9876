import json

import pytest

from castling_jax.compile_report.chips import CHIPS
from castling_jax.compile_report.estimate import Row
from castling_jax.compile_report.figures import UPDATE, part_of, parts_ms, report, summarize
from castling_jax.models.macs import OTHER
from tests.compile_report.texts import COMPILED

V5E = CHIPS["v5e"]


def test_figures_are_summed_and_sorted():
    figures = summarize(COMPILED, V5E)
    assert [name for _, name, _ in figures["top"]] == ["%fusion.1", "%fusion.3", "%scale.1"]
    assert figures["est_ms"] == pytest.approx(7e-3 + 62 / 1.5e6)
    assert sum(figures["parts_ms"].values()) == pytest.approx(figures["est_ms"])
    assert figures["prefetch_ms"] == pytest.approx(4096 / 819e6)
    assert (figures["temp_MB"], figures["args_MB"], figures["out_MB"]) == (2.0, 0.008, 0.004096)
    # The outputs that take the place of arguments count once.
    assert figures["total_MB"] == pytest.approx((8_000 + 4_096 - 4_000 + 2_000_000 + 1_000) / 1e6)
    assert figures["held_MB"] == {"parameters": 0.007}
    assert figures["incomplete"] == []
    (kernel,) = figures["kernels"]
    assert (kernel["name"], kernel["cycles"], kernel["bound"]) == ("%scale.1", 62, "VLOAD")
    # Twice half of the array, over the one link between two chips.
    assert figures["links_ms"] == pytest.approx({"all-reduce": 8 * 128 * 4 / 50e6})
    assert json.loads(json.dumps(figures)) == figures


def test_unknown_chip_is_refused(refuses):
    with refuses("unknown chip 'v9x'", "v5e"):
        report("layer", {}, topology="v9x:2x2", devices=1)


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ("jit(train_step)/jit(step)/transpose(jvp(mlp))/dot_general", "mlp"),
        ("jit(step)/jvp(pool)/qkv/dot_general", "qkv"),  # the innermost
        (
            "jit(step)/transpose(jvp())/cond/branch_0_fun/shard_map/linear_angular_backward/pallas_call",
            "linear_angular",
        ),
        ("jit(step)/jvp()/masked_softmax_forward/pallas_call", "masked_softmax"),
        ("jit(step)/jvp()/cond/branch_0_fun/masked_softmax_key_gradient/pallas_call", "masked_softmax"),
        ("jit(apply)/mul", OTHER),
    ],
)
def test_an_operation_is_of_the_part_that_it_names_last(label, part):
    assert part_of(label) == part


def test_what_a_step_does_outside_of_the_model_is_its_update():
    rows = [Row(2.0, "%a", "jit(step)/jvp(mlp)/mul"), Row(1.0, "%b", "jit(step)/mul"), Row(4.0, "%c", "jit(step)/add")]
    assert parts_ms(rows) == {UPDATE: 5.0, "mlp": 2.0}
    assert parts_ms(rows[1:]) == {OTHER: 5.0}  # of a program that differentiates nothing
