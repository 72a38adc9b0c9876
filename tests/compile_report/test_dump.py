import pytest

from castling_jax.compile_report.dump import (
    collectives,
    read_program,
    read_schedule,
    read_utilization,
    shape_bytes,
    trip_count,
)
from tests.compile_report.texts import ASYNCHRONOUS, BUNDLES, HLO, TIMES, UTILIZATION


def loop_of(hlo):
    program = read_program(hlo)
    entry = program.computations[program.entry]
    return program, next(i for i in entry if i.kind == "while"), entry


def test_program_is_read():
    program = read_program(HLO)
    assert program.entry == "main"
    assert list(program.computations) == ["body", "test", "cheap", "dear", "main"]
    fusion = program.computations["body"][5]
    assert (fusion.name, fusion.kind, fusion.label) == ("%fusion.1", "fusion", "jit(f)/while/body/tanh")
    assert fusion.cycles == 1500
    assert program.computations["body"][4].cycles is None
    assert program.computations["body"][-1].name == "%out"


def test_instruction_with_line_breaks_is_one():
    kernel = read_program(HLO).computations["main"][-1]
    assert kernel.kind == "custom-call"
    assert kernel.label == "jit(f)/scale"
    assert kernel.result == "f32[8,128]{1,0:T(8,128)S(1)}"
    assert kernel.kernel_operands == "{f32[8,128]{1,0"


def test_called_computations():
    main = {i.name: i for i in read_program(HLO).computations["main"]}
    assert main["%conditional.1"].called("branch_computations", "true_computation") == ["cheap", "dear"]
    assert main["%while.1"].called("body") == ["body"]
    assert main["%y"].called("body") == []


@pytest.mark.parametrize(
    ("change", "trips"),
    [
        (("", ""), 4),
        (("constant(6)", "constant(2)"), 0),
        (("constant(6)", "constant(-1)"), 0),
        (("constant(2)", "constant(-2)"), 8),
        (("%six = s32[] constant(6)", "%six = s32[] get-tuple-element(%state.1), index=0"), None),
        (("%two = s32[] constant(2)", "%two = s32[] parameter(2)"), None),
        (("%one = s32[] constant(1)", "%one = s32[] constant(2)"), None),
        (("direction=LT", "direction=GT"), None),
        (("add(%i, %one)", "multiply(%i, %one)"), None),
    ],
)
def test_trip_count(change, trips):
    assert trip_count(*loop_of(HLO.replace(*change))) == trips


def test_shape_bytes():
    assert shape_bytes("(f32[8,128]{1,0:T(8,128)}, bf16[3]{0}, s32[], pred[5], u8[0])") == 4096 + 6 + 4 + 5


def test_schedule_counts_loops_times_their_trips():
    schedule = read_schedule(BUNDLES)
    assert schedule.times == TIMES
    assert schedule.cycles == sum(TIMES)
    assert schedule.copied_bytes == 5 * 4 * 32  # not the one that the bounds check is for
    assert schedule.unknown_loops == 0


def test_loop_without_a_constant_trip_count_counts_once():
    schedule = read_schedule(BUNDLES.replace("%s5, 3 /* loop exit test */", "%s5, %s6 /* loop exit test */"))
    assert schedule.times == [1, 5, 5, 5, 5, 5, 5, 5, 1]
    assert schedule.unknown_loops == 1


@pytest.mark.parametrize(
    ("count", "size", "trips"),
    [
        ("sshrl.u32 (!%p6), %s3, 1", "sshll.u32 %s9, 2", [2, 2, 2, 1]),  # pairs of rows in blocks of 4, 4, 4 and 2
        ("sand.u32 1, %s3 /* smod.u32 w/div 2 */", "sshll.u32 %s9, 2", [0, 0, 0, 0]),  # and the rows that are left
        ("sand.u32 (%p6), 3, %s3", "smul.u32 3, %s9", [0, 0, 0, 0, 2]),
        ("sadd.s32 %s3, %s8", "sshll.u32 %s9, 2", None),
        ("sshrl.u32 %s3, 1", "sld [smem:[#allocation9_spill]]", None),
        ("sshrl.u32 %s3, 1", "smul.u32 %s9, %s8", None),
        ("sshrl.u32 %s3, 1", "sshll.u32 %s9, %s8", None),
    ],
)
def test_loop_over_the_rows_of_a_block_that_the_arrays_end_cuts(count, size, trips):
    """14 rows of an array."""
    before = f"%s1 = {size}  ;;  %s2 = ssub.s32 (%p4), 14, %s1  ;;  %p5 = scmp.lt.s32.totalorder (%p4), %s2, 4"
    rows = f"%s3 = smov (!%p5, %s2), 4  ;;  %s4 = {count}"
    text = BUNDLES.replace("%s10 = sadd", f"{before}  ;;  {rows}  ;;  %s10 = sadd").replace(
        "%s5, 3 /* loop exit test */", "%s5, %s4  ;;  %7 = sbr.rel (!%p2) target = $region3"
    )
    schedule = read_schedule(text)
    assert (
        read_schedule(text.replace("%p2 = scmp.ge.s32.totalorder ", "%p2 = scmp.ge.s32.totalorder (!%p6), "))
        == schedule
    )
    maximum = read_schedule(text.replace("%p5 = scmp.lt", "%p5 = scmp.gt"))
    assert maximum.unknown_loops == 1
    times = 5 if trips is None else round(5 * sum(trips) / len(trips))
    assert schedule.times == [1, 5, 5, 5, times, times, times, 5, 1]
    assert schedule.unknown_loops == (trips is None)


def test_utilization_counts_each_bundle_as_often_as_it_is_issued():
    cycles = sum(TIMES)
    expected = {"MXU": 4 / 4, "VALU": 15 / 4, "VLOAD": 15 * 2 / 3, "VLOAD:FILL": 15 / 3}
    assert read_utilization(UTILIZATION, TIMES) == pytest.approx({unit: n / cycles for unit, n in expected.items()})


def test_utilization_of_another_schedule_is_none():
    assert read_utilization(UTILIZATION, TIMES[1:]) == {}


def test_collectives_are_found_once_however_they_are_written():
    found = collectives(read_program(ASYNCHRONOUS))
    assert [(one.kind, one.arrays, one.label) for one in found] == [
        ("all-gather", [("bf16", "768,8")], "jit(f)/gather"),
        ("reduce-scatter", [("f32", "96,8"), ("f32", "8")], "jit(f)/sum"),
        ("collective-permute", [("f32", "8")], "jit(f)/split"),
        ("all-gather", [("f32", "16")], ""),
        ("all-reduce", [("f32", "8")], ""),
    ]
    assert all(f" {one.kind.replace('reduce-scatter', 'all-reduce')}" in one.text for one in found)
    assert [one.bytes for one in found] == [768 * 8 * 2, 97 * 8 * 4, 32, 64, 32]
