"""Planning without libtpu: reading a compiled program's text, and the process of the compiler (here a CPU's)."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tiue_jax.plan import chips, compiler, hlo, programs
from tiue_jax.plan import measure as measuring
from tiue_jax.plan.measure import measure

ROOT = Path(__file__).parents[1]
ABOUT = {"topology": "v5e:2x2", "program": "train", "batch_per_chip": 1, "data": 1, "fsdp": 2, "remat": None}


# ---- compiled text ---------------------------------------------------------------------------------------------------

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (arg: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %f = f32[8,16]{1,0} fusion(%all-reduce.1), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %f)
}

%cond (arg: (s32[], f32[8,16])) -> pred[] {
  %arg = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4,16]) -> f32[8,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
  %all-gather-start = (bf16[4,16]{1,0}, bf16[16,16]{1,0:S(1)}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %all-gather-done = bf16[16,16]{1,0} all-gather-done(%all-gather-start)
  %reduce-scatter.1 = f32[2,16]{1,0} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %m = f32[8,16]{1,0} all-reduce(%x), replica_groups=mesh['a'=1,'b'=8,'c'=4], device_ids=([4,8]T(1,0)) {'b','c':(1)2}
  %permute = f32[8,16]{1,0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
  %while.1 = (s32[], f32[8,16]{1,0}) while(%init), condition=%cond, body=%body, metadata={}
  ROOT %out = f32[8,16]{1,0} fusion(%w), kind=kLoop, calls=%add, backend_config={"flag":1,"estimated_cycles":"100"}
}
"""


def test_collectives_are_summed_with_their_loops():
    text = hlo.read(HLO)
    assert text.collectives == {
        "all-gather": (2, 2 * 16 * 16 * 2 * 3 // 4),
        "all-reduce": (6, 5 * 2 * 8 * 16 * 4 * 3 // 4 + 2 * 8 * 16 * 4 * 15 // 16),
        "collective-permute": (1, 8 * 16 * 4),
        "reduce-scatter": (1, 2 * 2 * 16 * 4 // 2),
    }
    assert text.background_bytes == 16 * 16 * 2 * 3 // 4  # the all-gather with a start
    assert text.estimated_cycles == 100 + 5 * 7


def test_collectives_of_gpus():
    """Several arrays are sent at once. "is_sync" says that the GPU computes nothing between start and end."""
    text = """ENTRY %main (p: f32[4]) -> f32[32] {
  %ar = (f32[100]{0}, f32[28]{0}) all-reduce-start(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add, \
backend_config={"collective_backend_config":{"is_sync":false}}
  %ag = ((f32[4]{0}, f32[8]{0}), (f32[32]{0}, f32[64]{0})) all-gather-start(%p, %q), replica_groups=[1,8]<=[8], \
backend_config={"collective_backend_config":{"is_sync":true}}
  ROOT %done = (f32[32]{0}, f32[64]{0}) all-gather-done(%ag)
}
"""
    read = hlo.read(text)
    assert read.collectives == {"all-gather": (1, 96 * 4 * 7 // 8), "all-reduce": (1, 2 * 128 * 4 * 7 // 8)}
    assert read.background_bytes == 2 * 128 * 4 * 7 // 8


def test_a_fused_reduce_scatter_is_one():
    text = """%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %all-reduce.9 = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.9, %i, %j), dynamic_slice_sizes={2,16}
}

%inside (p: f32[8,16]) -> f32[2,16] {
  ROOT %f = f32[2,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}

%called (p: f32[8,16]) -> f32[2,16] {
  ROOT %c = f32[2,16]{1,0} call(%p), to_apply=%inside
}

ENTRY %main (p: f32[8,16]) -> f32[2,16] {
  %s = ((f32[8,16]{1,0}), f32[2,16]{1,0}, s32[]) async-start(%p), calls=%called
  ROOT %d = f32[2,16]{1,0} async-done(%s), calls=%called
}
"""
    sent = 8 * 16 * 4 * 3 // 4
    assert hlo.read(text) == hlo.Text({"reduce-scatter": (1, sent)}, background_bytes=sent, estimated_cycles=None)


def test_a_collective_that_advances_in_other_fusions_is_one():
    gather = "bf16[16,16]{1,0} all-gather(%p), channel_id={}, replica_groups={{0,1,2,3}}, dimensions={0}"
    text = """%fused_computation.1 (p: bf16[4,16]) -> (bf16[16,16], u32[]) {
  %all-gather.1 = GATHER7
  ROOT %custom-call.1 = (bf16[16,16]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.5 (p: bf16[4,16]) -> (bf16[8,16], bf16[16,16], u32[]) {
  %all-gather.2 = GATHER7
  %convolution = bf16[8,16]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  ROOT %tuple = (bf16[8,16]{1,0}, bf16[16,16]{1,0}, u32[]) tuple(%convolution, %all-gather.2, %flag)
}

%fused_computation.2 (p: bf16[4,16]) -> bf16[16,16] {
  %all-gather.3 = GATHER7
  ROOT %custom-call.2 = bf16[16,16]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[4,16]) -> bf16[16,16] {
  %async-collective-start = (bf16[16,16]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%fused_computation.1
  %fusion.5 = (bf16[8,16]{1,0}, bf16[16,16]{1,0}, u32[]) fusion(%q), kind=kCustom, calls=%async_collective_fusion.5
  %async-collective-done = bf16[16,16]{1,0} fusion(%r), kind=kCustom, calls=%fused_computation.2
  ROOT %all-gather.4 = GATHER8
}
"""
    for channel in "78":
        text = text.replace(f"GATHER{channel}", gather.replace("{}", channel))
    sent = 16 * 16 * 2 * 3 // 4
    assert hlo.read(text) == hlo.Text({"all-gather": (2, 2 * sent)}, background_bytes=sent, estimated_cycles=None)


def test_collectives_in_a_loop_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="all-reduce in a loop of unknown length"):
        hlo.read(HLO.replace("direction=LT", "direction=NE"))


def test_text_of_a_real_program():
    """Compares with XLA's text of a program and its count of memory."""
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c * 2 + 1, x)).lower(1.0).compile()
    assert hlo.read(compiled.as_text()) == hlo.Text({}, 0, None)
    assert hlo.bytes_accessed(compiled.as_text()) == compiled.cost_analysis()["bytes accessed"]


# ---- the compiler's process ------------------------------------------------------------------------------------------


def test_memory_needed():
    needed = compiler.memory_needed
    assert needed("the total memory required for HLO temporaries (25.06G) exceeds") == round(25.06 * 2**30)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded ..."
    assert needed(message) == round(20.25 * 2**30)
    assert needed("INTERNAL: something else") is None


def test_the_error_that_a_flag_avoids_names_the_flag():
    message = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.7886"
    told = compiler.with_remedy(message)
    assert "set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false" in told and told.endswith(message)
    assert compiler.with_remedy("INTERNAL: something else") == "INTERNAL: something else"


def test_memory_of_an_assignment():
    assignment = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 reduce_sum.650 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 8388608, parameter 0, shape |f32[1024,2048]| at ShapeIndex {0}, maybe-live-out:
allocation 2: size 1024, output shape is |(f32[1024,2048], f32[])|, maybe-live-out:
allocation 3: size 8552960, preallocated-temp:
 value: <3 fusion.1 @0> (size=8552960,offset=0): f32[1024,2048]{1,0}
allocation 4: size 62914560, color 1, preallocated-temp:
"""
    assert compiler.memory(assignment) == (8_388_608 + 1_024 + 8_552_960, 8_552_960)


def build(size):
    """A small program that the CPU's compiler accepts too."""
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    if size > 1_000:
        os._exit(9)
    jitted = jax.jit(lambda x: jnp.sin(x) @ x)
    return programs.Program(jitted.trace(jax.ShapeDtypeStruct((size, size), jnp.float32)), {"x": 4 * size**2})


@pytest.mark.parametrize("mode", compiler.MODES)
def test_a_program_is_compiled_in_another_process(mode):
    found = measure(functools.partial(build, 64), chips.CHIPS["v5e"], 2, mode, **ABOUT)
    assert found.flops_per_chip == 64**3 and found.state_bytes == 4 * 64**2 and found.mode == mode
    assert found.fits and found.peak_bytes >= 2 * 4 * 64**2 and found.bytes_accessed and found.collectives == {}


def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch):
    """The compiler rounds to a hundredth of a GiB: "Used 15.75G of 15.75G"."""
    all_of_it = chips.CHIPS["v5e"].hbm_bytes
    monkeypatch.setattr(measuring, "compile_program", lambda *args: compiler.Compiled({}, 8, all_of_it, 0, 0, ""))
    found = measure(functools.partial(build, 64), chips.CHIPS["v5e"], 2, "quick", **ABOUT)
    assert not found.fits and found.peak_bytes == all_of_it and found.collectives is None


def test_the_compiler_ends_when_its_parent_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    call = [sys.executable, "-m", "tests.programs.compile_forever", pid_file]
    parent = subprocess.Popen(call, cwd=ROOT)
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    parent.kill()
    parent.wait()
    status = Path(f"/proc/{pid_file.read_text()}/stat")
    wait_until(lambda: not status.exists() or " Z " in status.read_text())  # Z: ended, its new parent has not asked yet


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.1)


def test_errors_of_the_other_process():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        measure(functools.partial(build, 0), chips.CHIPS["v5e"], 1, "quick", **ABOUT)
    with pytest.raises(RuntimeError, match="the compiler's process ended with status 9"):
        measure(functools.partial(build, 1_001), chips.CHIPS["v5e"], 1, "quick", **ABOUT)
