"""A program and a kernel's dumps as the TPU compiler writes them, cut down to what is read."""

from castling_jax.compile_report.compile import Compiled
from castling_jax.compile_report.kernels import KernelSchedule

# ruff: noqa: E501

# A loop of 4 trips (2 to 6) that calls a fusion, a conditional, a kernel, a collective and a prefetch.
HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0})->f32[8,128]{1,0}}

FileNames
1 "f.py"

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), metadata={op_name="jit(f)/while/body/add"}
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/tanh"}, backend_config={"estimated_cycles":"1500"}
  ROOT %out = (s32[], f32[8,128]{1,0}) tuple(%next, %fusion.1)
}

%test (state.1: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %six = s32[] constant(6)
  %copied = s32[] copy(%six)
  ROOT %less = pred[] compare(%i.1, %copied), direction=LT
}

%cheap (x.1: f32[8,128]) -> f32[8,128] {
  ROOT %fusion.2 = f32[8,128]{1,0} fusion(%x.1), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"3000"}
}

%dear (x.2: f32[8,128]) -> f32[8,128] {
  ROOT %fusion.3 = f32[8,128]{1,0} fusion(%x.2), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"4500"}
}

ENTRY %main (x.3: f32[8,128]) -> f32[8,128] {
  %x.3 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %two = s32[] constant(2)
  %start = (s32[], f32[8,128]{1,0}) tuple(%two, %x.3)
  %while.1 = (s32[], f32[8,128]{1,0}) while(%start), condition=%test, body=%body, metadata={op_name="jit(f)/while"}
  %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %copy-start.1 = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %all-reduce.1 = f32[8,128]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1}}, to_apply=%sum, backend_config={"estimated_cycles":"750"}
  %switch = s32[] parameter(1)
  %conditional.1 = f32[8,128]{1,0} conditional(%switch, %y, %y), branch_computations={%cheap, %dear}
  ROOT %scale.1 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%conditional.1), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}, frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(f)/scale"}
}
"""

# A grid of 5 steps, and in each a loop of 3 trips.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %6 = vsyncpa [#allocation3], 0 }
   0x1 LB: > { %s10 = sadd.s32 4294967295, %s9 /* iteration index */ }
   0x2   : > { %752 = shalt.err (!%p3) /* BoundsCheck 0 [deref of %s95] for %564 = dma.hbm_to_vmem [thread:$0]  (!%p5), /*hbm=*/%s95, /*size_in_granules=*/2048, /*vmem=*/%s97
base_bounds: (128, 1) */ }
   0x3   : > { %564 = dma.hbm_to_vmem [thread:$0]  (!%p5), /*hbm=*/%s95, /*size_in_granules=*/4, /*vmem=*/%s97, /*dst_syncflagno=*/%s85 }
   0x4 LB: >> { %v1 = vld [vmem:[%s24] sm:$0xff]  ;;  %v2 = vld [vmem:[%s24 + $0x8] sm:$0xff] }
   0x5   :  {}
   0x6   : >> { %p2 = scmp.ge.s32.totalorder %s5, 3 /* loop exit test */  ;;  %v3 = vadd.f32 %v1, %v2 }
   0x7 PF: > { %p1 = scmp.ge.s32.totalorder (%p9), %s11, 5 /* loop exit test */ }
   0x8   :  { %398 = vsyncpa [#allocation3], 1 }
"""
TIMES = [1, 5, 5, 5, 15, 15, 15, 5, 1]

UTILIZATION = """== CAPACTIY:
MXU, VALU, VLOAD, VLOAD:FILL
    4     4     3     3
== UTILIZATION:
0 0 0 0
0 0 0 0
0 0 0 0
0 0 0 0
0 0 2 1
0 0 0 0
0 1 0 0
0 0 0 0
4 0 0 0
"""

# As the compiler writes collectives that run beside the compute, and a reduce-scatter.
ASYNCHRONOUS = """
%start (a: bf16[96,8]) -> (bf16[96,8], bf16[768,8], u32[]) {
  %all-gather.1 = bf16[768,8]{1,0} all-gather(%a), channel_id=3, dimensions={0}, metadata={op_name="jit(f)/gather"}
}

%go_on (b: bf16[96,8]) -> (bf16[96,8], bf16[768,8], u32[]) {
  %all-gather.2 = bf16[768,8]{1,0} all-gather(%b), channel_id=3, dimensions={0}, metadata={op_name="jit(f)/gather"}
}

%all-reduce-scatter.1 (c: f32[768,8], d: f32[64]) -> (f32[96,8], f32[8]) {
  %all-reduce.1 = (f32[768,8]{1,0}, f32[64]{0}) all-reduce(%c, %d), to_apply=%sum, metadata={op_name="jit(f)/sum"}
}

ENTRY %main (x: bf16[96,8]) -> bf16[96,8] {
  %async-collective-start.1 = (bf16[96,8]{1,0}, bf16[768,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%start
  %async_collective_fusion.1 = (f32[2]{0}, bf16[96,8]{1,0}, u32[]) fusion(%y), kind=kCustom, calls=%go_on
  %async-collective-done.1 = bf16[768,8]{1,0} fusion(%z), kind=kCustom, calls=%go_on
  %fusion.1 = (f32[96,8]{1,0}, f32[8]{0}) fusion(%c, %d), kind=kCustom, calls=%all-reduce-scatter.1
  %permute = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%e), metadata={op_name="jit(f)/split"}
  %permuted = f32[8]{0} collective-permute-done(%permute)
  %gather = (f32[2]{0}, f32[16]{0}) all-gather-start(%e), dimensions={0}
  %reduce = f32[8]{0} all-reduce-start(%e), to_apply=%sum
}
"""

# What is known of HLO's program, on two devices.
COMPILED = Compiled(
    hlo=HLO,
    memory={"arguments": 8_000, "outputs": 4_096, "aliased": 4_000, "temporary": 2_000_000, "code": 1_000},
    traffic_bytes=5e6,
    held={"parameters": 7_000, "moving averages": 0},
    facts={
        "model": "deit_micro",
        "attention": "castling",
        "image_size": 8,
        "form": "train",
        "mesh": {"data": 2},
        "images": 4,
        "images_per_device": 2.0,
        "assumed": [],
        "macs": 3,
    },
    devices=[[0, 0, 0], [0, 1, 0]],
    kernels={
        "scale f32[8,128] f32[8,128]": KernelSchedule(
            cycles=62, copied_bytes=0, pipeline_bytes=0, unknown_loops=0, utilization={"MXU": 0.01, "VLOAD": 0.15}
        )
    },
)
