import pytest

from castling_jax.compile_report.dump import read_program
from castling_jax.compile_report.memory import activation_bytes, hbm_bytes

# A forward pass makes %a, %b and %c; %a is used again in the backward pass, by another name; %c lies in fast memory.
STEP = """
ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %a = f32[256]{0} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp()/mul"}
  %again = f32[16,16]{1,0} bitcast(%a)
  %b = f32[128]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp()/sum"}
  %c = f32[512]{0:T(512)S(1)} fusion(%b), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp()/exp"}
  %d = f32[64]{0} fusion(%c), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp()/log"}
  %e = f32[256]{0} fusion(%d, %again), kind=kLoop, calls=%f, metadata={op_name="jit(step)/transpose(jvp())/mul"}
  ROOT %g = f32[256]{0} fusion(%e), kind=kLoop, calls=%f, metadata={op_name="jit(step)/add"}
}
"""


def test_activations_are_what_the_forward_pass_made_and_is_still_used():
    assert activation_bytes(read_program(STEP)) == (256 + 128) * 4  # while %b is read
    kept = STEP.replace("fusion(%d, %again)", "fusion(%d, %again, %b)")
    assert activation_bytes(read_program(kept)) == (256 + 128 + 64) * 4
    assert activation_bytes(read_program(STEP.replace("jvp()", "mlp"))) == 0


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("f32[8]{0}", 32),
        ("f32[8]{0:T(8)S(1)}", 0),
        ("(bf16[8]{0:T(8)(2,1)}, f32[2,2]{1,0:T(8,128)S(1)}, s32[])", 16 + 4),
    ],
)
def test_fast_memory_is_not_hbm(result, size):
    (instruction,) = read_program(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %y = {result} fusion(%x)\n}}").computations[
        "main"
    ]
    assert hbm_bytes(instruction) == size
