import pytest

from castling_jax.compile_report.chips import CHIPS
from castling_jax.compile_report.dump import read_program
from castling_jax.compile_report.estimate import Estimator
from castling_jax.compile_report.kernels import KernelSchedule
from tests.compile_report.texts import ASYNCHRONOUS, HLO

V5E = CHIPS["v5e"]  # 1.5 GHz: 1500 cycles are a microsecond
SCALE = "scale f32[8,128] f32[8,128]"


def schedule(**changes):
    """Of the kernel in HLO."""
    figures = {"cycles": 62, "copied_bytes": 0, "pipeline_bytes": 0, "unknown_loops": 0, "utilization": {"VLOAD": 0.2}}
    return KernelSchedule(**figures | changes)


def estimate(hlo, kernels=None):
    program = read_program(hlo)
    estimator = Estimator(program, {SCALE: schedule()} if kernels is None else kernels, V5E)
    return estimator.computation(program.entry, times=1), estimator.incomplete


def milliseconds(cost):
    return {row.name: row.milliseconds for row in cost.rows}


def test_loops_count_times_their_trips_and_of_a_conditional_the_dearest_branch():
    cost, incomplete = estimate(HLO)
    found = milliseconds(cost)
    kernel = found.pop("%scale.1")
    assert found == pytest.approx({"%fusion.1": 4e-3, "%fusion.3": 3e-3})  # without the collective
    assert cost.milliseconds == pytest.approx(7e-3 + kernel)
    assert incomplete == set()


def test_loop_of_unknown_length_counts_once_and_is_incomplete():
    cost, incomplete = estimate(HLO.replace("%two = s32[] constant(2)", "%two = s32[] parameter(2)"))
    assert milliseconds(cost)["%fusion.1"] == pytest.approx(1e-3)
    assert incomplete == {"loop %while (jit(f)/while): trip count is not a constant, counted once"}


def test_collectives_and_prefetches_are_counted_in_bytes():
    cost, _ = estimate(HLO)
    assert cost.collectives == {"all-reduce": 8 * 128 * 4}
    assert cost.prefetched_bytes == 8 * 128 * 4


def test_fusions_that_only_wait_for_a_collective_are_not_incomplete():
    cost, incomplete = estimate(ASYNCHRONOUS)
    sent = {"all-gather": 768 * 8 * 2 + 64, "reduce-scatter": 97 * 8 * 4, "collective-permute": 32, "all-reduce": 32}
    assert cost.collectives == sent
    assert incomplete == set()


def test_kernel_takes_its_bundles_or_its_traffic():
    for moved, bound in ((0, "VLOAD"), (10**6, "HBM")):
        cost, _ = estimate(HLO, {SCALE: schedule(pipeline_bytes=moved)})
        kernel = cost.rows[-1].kernel
        assert kernel.compute_ms == pytest.approx(62 / 1.5e6)
        assert kernel.traffic_ms == pytest.approx(moved / 819e6)
        assert cost.rows[-1].milliseconds == max(kernel.compute_ms, kernel.traffic_ms)
        assert kernel.bound == bound


def test_what_only_moves_data_takes_its_traffic_where_it_has_no_estimate():
    copied = "%reversed = f32[2048,128]{1,0} reverse(%y), dimensions={0}"
    cost, incomplete = estimate(HLO.replace("  %switch =", f"  {copied}\n  %switch ="))
    assert milliseconds(cost)["%reversed"] == pytest.approx(2 * 2048 * 128 * 4 / 819e6)
    assert incomplete == set()


def test_traffic_that_is_not_known_is_the_arrays_or_the_copies():
    for copied, moved in ((0, 2 * 8 * 128 * 4), (10**6, 10**6)):
        cost, _ = estimate(HLO, {SCALE: schedule(pipeline_bytes=None, copied_bytes=copied)})
        assert cost.rows[-1].kernel.traffic_ms == pytest.approx(moved / 819e6)


def test_kernel_without_a_schedule_is_incomplete():
    cost, incomplete = estimate(HLO, {})
    kernel = cost.rows[-1].kernel
    assert (kernel.cycles, kernel.utilization, kernel.bound) == (0, {}, "HBM")
    assert incomplete == {"kernel %scale: no schedule dumped, HBM traffic only"}


def test_kernel_without_a_name_is_known_by_its_arrays():
    cost, incomplete = estimate(HLO, {SCALE.replace("scale", "unnamed_kernel"): schedule()})
    assert cost.rows[-1].kernel.cycles == 62
    assert incomplete == set()


def test_kernel_with_a_loop_of_unknown_length_is_incomplete():
    _, incomplete = estimate(HLO, {SCALE: schedule(unknown_loops=1)})
    assert incomplete == {"kernel %scale: 1 loops whose trip count is not a constant, counted once"}


@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        (
            '%sort.1 = f32[2048]{0} sort(%y), metadata={op_name="jit(f)/sort"}',
            "sort %sort (jit(f)/sort): no estimate",
        ),
        (  # where the compiler gives up
            '%fusion.9 = f32[2048]{0} fusion(%y), calls=%dear, metadata={op_name="jit(f)/div"}, '
            'backend_config={"estimated_cycles":"9223372036854775807"}',
            "fusion %fusion (jit(f)/div): no estimate",
        ),
        ("%send.1 = (f32[8]{0}, u32[]) send(%y), channel_id=1", "send %send.1: talks to the host"),
        (
            '%async.1 = ((f32[8]{0}), f32[8]{0}) async-start(%y), async_execution_thread="host", calls=%dear',
            "async-start %async.1: runs elsewhere than on the chip",
        ),
        ('%buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"', None),
        ("%negate.1 = f32[] negate(%z)", None),
        ("%xor.1 = u32[8,128]{1,0} xor(%z, %z)", None),  # a register
    ],
)
def test_what_cannot_be_counted_is_incomplete(instruction, what):
    _, incomplete = estimate(HLO.replace("  %switch =", f"  {instruction}\n  %switch ="))
    assert incomplete == ({what} if what else set())
