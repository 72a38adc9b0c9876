import dataclasses
import json

import pytest

from castling_jax.compile_report.cases import Facts
from castling_jax.compile_report.estimate import Row
from castling_jax.compile_report.figures import UPDATE, RecipeReport, part_of, parts_ms, report, summarize
from castling_jax.models.macs import OTHER
from tests.compile_report.texts import COMPILED


def test_figures_are_summed_and_sorted():
    report = summarize(COMPILED, "v5e:2x2")
    assert [operation.name for operation in report.top] == ["%fusion.1", "%fusion.3", "%scale.1"]
    assert report.est_ms == pytest.approx(7e-3 + 62 / 1.5e6)
    assert sum(report.parts_ms.values()) == pytest.approx(report.est_ms)
    assert report.prefetch_ms == pytest.approx(4096 / 819e6)
    assert (report.temp_MB, report.args_MB, report.out_MB) == (2.0, 0.008, 0.004096)
    # The outputs that take the place of arguments count once.
    assert report.total_MB == pytest.approx((8_000 + 4_096 - 4_000 + 2_000_000 + 1_000) / 1e6)
    assert report.held_MB == {"parameters": 0.007}
    assert report.incomplete == []
    (kernel,) = report.kernels
    assert (kernel.name, kernel.cycles, kernel.bound) == ("%scale.1", 62, "VLOAD")
    # Twice half of the array, over the one link between two chips.
    assert report.links_ms == pytest.approx({"all-reduce": 8 * 128 * 4 / 50e6})


def test_json_keeps_the_keys_that_programs_read():
    figures = json.loads(json.dumps(summarize(COMPILED, "v5e:2x2").to_json()))
    assert set(figures) == {
        *("topology", "facts", "est_ms", "prefetch_ms", "temp_MB", "args_MB", "out_MB", "total_MB", "activations_MB"),
        *("held_MB", "traffic_MB", "collectives", "links_ms", "incomplete", "top", "sources", "parts_ms", "kernels"),
    }
    assert figures["facts"] == {}
    assert figures["top"][0] == [pytest.approx(4e-3), "%fusion.1", "jit(f)/while/body/tanh"]
    assert figures["sources"][0] == [pytest.approx(4e-3), 1, "jit(f)/while/body/tanh"]
    keys = {"name", "ms", "cycles", "compute_ms", "traffic_ms", "bound", "utilization"}
    assert set(figures["kernels"][0]) == keys


def recipe_report():
    return RecipeReport(**vars(summarize(COMPILED, "v5e:2x2")), facts=Facts(**COMPILED.facts))


def test_a_configurations_report_comes_back_from_its_file():
    report = recipe_report()
    kept = json.loads(json.dumps(dataclasses.asdict(report)))
    assert RecipeReport.from_json(kept) == report
    step = {"links_total_ms", "step_ms", "images_per_second_per_chip", "mfu", "roofline"}
    assert set(report.to_json()) - set(kept) == step
    assert report.to_json()["facts"] == COMPILED.facts


def test_a_step_is_the_estimate_and_the_links():
    links = {"all-reduce": 2.0, "all-gather": 1.0}
    facts = dataclasses.replace(Facts(**COMPILED.facts), macs=1_000_000, images_per_device=128.0)
    train = dataclasses.replace(recipe_report(), est_ms=7.0, links_ms=links, traffic_MB=819.0, facts=facts)
    assert (train.links_total_ms, train.step_ms) == (3.0, 10.0)
    assert train.images_per_second_per_chip == pytest.approx(12_800)
    flops = 6 * 1e6 * 128  # forward, and twice as much backward, of two operations each
    assert train.mfu == pytest.approx(flops / (10e-3 * 197e12))
    roofline = {"flops": flops, "compute_ms": flops / 197e9, "hbm_ms": 1.0}
    assert dataclasses.asdict(train.roofline) == pytest.approx(roofline)
    inference = dataclasses.replace(train, facts=dataclasses.replace(facts, form="inference"))
    assert inference.roofline.flops == pytest.approx(flops / 3)


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
