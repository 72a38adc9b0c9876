import pytest

from castling_jax.tools.tpu_dump import read_program
from castling_jax.tools.tpu_estimate import CHIPS, Estimator
from tests.tools.tpu_texts import ASYNCHRONOUS, BUNDLES, HLO, TIMES, UTILIZATION

V5E = CHIPS["v5e"]  # 1.5 GHz: 1500 cycles are a microsecond
SCALE = "f32[8,128],f32[8,128]"


@pytest.fixture
def dump(tmp_path):
    (tmp_path / "17-scale.1-71-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-scale.1-70-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    (tmp_path / "17-rescale.1-71-final_bundles.txt").write_text("")
    (tmp_path / "17-scale.1-69-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    return tmp_path


def estimate(hlo, dump, traffic=None):
    program = read_program(hlo)
    estimator = Estimator(program, traffic or {}, dump, V5E)
    return estimator.computation(program.entry, times=1), estimator.incomplete


def milliseconds(cost):
    return {row.name: row.milliseconds for row in cost.rows}


def test_loops_count_times_their_trips_and_of_a_conditional_the_dearest_branch(dump):
    cost, incomplete = estimate(HLO, dump)
    found = milliseconds(cost)
    kernel = found.pop("%scale.1")
    assert found == pytest.approx({"%fusion.1": 4e-3, "%fusion.3": 3e-3, "%all-reduce.1": 0.5e-3})
    assert cost.milliseconds == pytest.approx(7.5e-3 + kernel)
    assert incomplete == set()


def test_loop_of_unknown_length_counts_once_and_is_incomplete(dump):
    cost, incomplete = estimate(HLO.replace("%two = s32[] constant(2)", "%two = s32[] parameter(2)"), dump)
    assert milliseconds(cost)["%fusion.1"] == pytest.approx(1e-3)
    assert incomplete == {"loop %while.1 (jit(f)/while): trip count is not a constant, counted once"}


def test_collectives_and_prefetches_are_counted_in_bytes(dump):
    cost, _ = estimate(HLO, dump)
    assert cost.collectives == {"all-reduce": 8 * 128 * 4}
    assert cost.prefetched_bytes == 8 * 128 * 4


def test_fusions_that_only_wait_for_a_collective_are_not_incomplete(dump):
    cost, incomplete = estimate(ASYNCHRONOUS, dump)
    sent = {"all-gather": 768 * 8 * 2 + 64, "reduce-scatter": 97 * 8 * 4, "collective-permute": 32, "all-reduce": 32}
    assert cost.collectives == sent
    assert incomplete == set()


def test_kernel_takes_its_bundles_or_its_traffic(dump):
    for moved, bound in ((0, "VLOAD"), (10**6, "HBM")):
        cost, _ = estimate(HLO, dump, {SCALE: moved})
        kernel = cost.rows[-1].kernel
        assert kernel.cycles == sum(TIMES)
        assert kernel.compute_ms == pytest.approx(sum(TIMES) / 1.5e6)
        assert kernel.traffic_ms == pytest.approx(moved / 819e6)
        assert cost.rows[-1].milliseconds == max(kernel.compute_ms, kernel.traffic_ms)
        assert kernel.bound == bound
        assert kernel.utilization["VLOAD"] == pytest.approx(15 * 2 / 3 / sum(TIMES))


def test_traffic_that_is_not_known_is_the_arrays_or_the_copies(dump):
    cost, _ = estimate(HLO, dump, {SCALE: None})
    assert cost.rows[-1].kernel.traffic_ms == pytest.approx(2 * 8 * 128 * 4 / 819e6)
    (dump / "17-scale.1-71-final_bundles.txt").write_text(BUNDLES.replace("granules=*/4,", "granules=*/4000,"))
    cost, _ = estimate(HLO, dump, {SCALE: None})
    assert cost.rows[-1].kernel.traffic_ms == pytest.approx(5 * 4000 * 32 / 819e6)


def test_kernel_without_a_schedule_is_incomplete(tmp_path):
    cost, incomplete = estimate(HLO, tmp_path)
    kernel = cost.rows[-1].kernel
    assert (kernel.cycles, kernel.utilization, kernel.bound) == (0, {}, "HBM")
    assert incomplete == {"kernel %scale.1: no schedule dumped, HBM traffic only"}


def test_kernels_that_are_the_same_are_dumped_once(dump):
    kernel = (
        '  {} = f32[8]{{0}} custom-call(%y), custom_call_target="tpu_custom_call", '
        'operand_layout_constraints={{f32[8]{{0}}}}, backend_config={{"body":"{}"}}\n'
    )
    (dump / "17-first-71-final_bundles.txt").write_text(BUNDLES)
    calls = "".join(kernel.format(*call) for call in (("%first", "TUzv"), ("%again", "TUzv"), ("%other", "AAAA")))
    cost, incomplete = estimate(HLO.replace("  %switch =", f"{calls}  %switch ="), dump)
    cycles = {row.name: row.kernel.cycles for row in cost.rows if row.kernel}
    assert cycles == {"%first": sum(TIMES), "%again": sum(TIMES), "%other": 0, "%scale.1": sum(TIMES)}
    assert incomplete == {"kernel %other: no schedule dumped, HBM traffic only"}


def test_kernel_with_a_loop_of_unknown_length_is_incomplete(dump):
    bundles = BUNDLES.replace("%s5, 3 /* loop exit test */", "%s5, %s6 /* loop exit test */")
    (dump / "17-scale.1-71-final_bundles.txt").write_text(bundles)
    _, incomplete = estimate(HLO, dump)
    assert incomplete == {"kernel %scale.1: 1 loops whose trip count is not a constant, counted once"}


@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        ('%sort.1 = f32[8]{0} sort(%y), metadata={op_name="jit(f)/sort"}', "sort %sort.1 (jit(f)/sort): no estimate"),
        ("%send.1 = (f32[8]{0}, u32[]) send(%y), channel_id=1", "send %send.1: talks to the host"),
        (
            '%async.1 = ((f32[8]{0}), f32[8]{0}) async-start(%y), async_execution_thread="host", calls=%dear',
            "async-start %async.1: runs elsewhere than on the chip",
        ),
        ('%buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"', None),
        ("%negate.1 = f32[] negate(%z)", None),
    ],
)
def test_what_cannot_be_counted_is_incomplete(dump, instruction, what):
    _, incomplete = estimate(HLO.replace("  %switch =", f"  {instruction}\n  %switch ="), dump)
    assert incomplete == ({what} if what else set())
