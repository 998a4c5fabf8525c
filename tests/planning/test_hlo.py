import jax
import jax.numpy as jnp
import pytest

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning.hlo import Collective, collectives, trip_counts
from bioscan_jax.planning.programs import EmbedProgram

# libtpu's text, shortened: an exchange written in each computation that overlaps with it (v5e), one in a loop, one outside.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,4]{1,0:T(8,128)(2,1)})->f32[8]{0}}

%add.1 (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  %x.1 = bf16[]{:T(256)} parameter(0)
  %y.1 = bf16[]{:T(256)} parameter(1)
  ROOT %add.9 = bf16[]{:T(256)} add(%x.1, %y.1), metadata={op_name="jit(step)/all-gather(" stack_frame_id=3}
}

%async_collective_fusion.1 (param_0: bf16[32,8]) -> (bf16[1,8,4], u32[]) {
  %param_0 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.55 = bf16[1,8,4]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=5, dimensions={1}
  ROOT %tuple.1 = (bf16[1,8,4]{2,1,0}, u32[]) tuple(%all-gather.55)
}

%async_collective_fusion.2 (param_0.1: bf16[32,8]) -> bf16[1,8,4] {
  %param_0.1 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.57 = bf16[1,8,4]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=5, dimensions={1}
}

%region_4.body (wide.param: (s32[], bf16[32,8])) -> (s32[], bf16[32,8]) {
  %wide.param = (s32[]{:T(256)}, bf16[32,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.5 = s32[]{:T(256)} constant(7)
  %fusion.1 = (bf16[1,8,4]{2,1,0}, u32[]) fusion(%wide.param), kind=kOutput, calls=%async_collective_fusion.1
  %fusion.2 = bf16[1,8,4]{2,1,0} fusion(%fusion.1), kind=kOutput, calls=%async_collective_fusion.2
  %all-reduce.11 = (bf16[4]{0:T(1024)(128)(2,1)}, /*index=1*/f32[2,3]{1,0}) all-reduce(%a, %b), channel_id=2, to_apply=%add.1
  ROOT %tuple.2 = (s32[]{:T(256)}, bf16[32,8]{1,0:T(8,128)(2,1)}) tuple(%wide.param)
}

%region_5.condition (wide.param.1: (s32[], bf16[32,8])) -> pred[] {
  %constant.177 = s32[]{:T(256)} constant(32)
  %wide.param.1 = (s32[]{:T(256)}, bf16[32,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.168 = s32[]{:T(256)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.29 = pred[]{:T(1024)} compare(%get-tuple-element.168, %constant.177), direction=LT
}

ENTRY %main.10 (param: bf16[8,4]) -> f32[8] {
  %param = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather-start.3 = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%param), channel_id=9, dimensions={0}
  %all-gather-done.3 = bf16[64,4]{1,0} all-gather-done(%all-gather-start.3)
  %ragged-all-to-all.1 = s8[16]{0} ragged-all-to-all(%param), replica_groups={}
  %collective-permute-start.1 = (s4[6]{0}, s4[6]{0}, u32[], u32[]) collective-permute-start(%param), channel_id=12
  %while.9 = (s32[]{:T(256)}, bf16[32,8]{1,0:T(8,128)(2,1)}) while(%t), condition=%region_5.condition, body=%region_4.body
  ROOT %gte.1 = f32[8]{0} get-tuple-element(%while.9), index=1
}
"""


def test_exchanges_of_a_tpu_program():
    assert collectives(PROGRAM) == [
        Collective("all-gather", "bf16", 1 * 8 * 4 * 2, in_loop=True),
        Collective("all-reduce", "bf16, f32", 4 * 2 + 6 * 4, in_loop=True),
        Collective("all-gather", "bf16", 64 * 4 * 2, in_loop=False),
        Collective("all-to-all", "s8", 16, in_loop=False),
        Collective("collective-permute", "s4", 3, in_loop=False),
    ]


def test_iterations_of_a_tpu_loop():
    assert trip_counts(PROGRAM) == [32]
    assert trip_counts(PROGRAM.replace("direction=LT", "direction=NE")) == [None]
    assert trip_counts(PROGRAM.replace("while(%t),", 'while(%t), backend_config={"known_trip_count":{"n":"5"}},')) == [
        5
    ]
    assert trip_counts("") == []


@pytest.mark.parametrize("params", ["replicated", "fsdp"])
def test_a_program_compiled_here(params):
    layout = make_layout(config.MeshConfig(params=params))
    program = EmbedProgram(transformer=PRESETS["tiny-v1"], dtype="float32", embed=config.EmbedConfig())
    step, arguments = program.build(layout, BatchShape(8, 32))
    text = step.lower(*arguments).compile().as_text()
    found = collectives(text)
    assert trip_counts(text)[-1] == PRESETS["tiny-v1"].num_hidden_layers
    assert {one.kind for one in found} == ({"all-gather"} if params == "fsdp" else set())
    if params == "fsdp":
        kernels = sorted(one.bytes for one in found if one.in_loop and one.bytes > 10_000)
        d = PRESETS["tiny-v1"].hidden_size
        assert kernels == [4 * d * d] * 4 + [4 * d * 4 * d] * 2
        tables = {one.bytes for one in found if not one.in_loop}
        assert PRESETS["tiny-v1"].vocab_size * d * 4 in tables


def test_a_loop_inside_a_loop():
    def nested(x):
        inner = lambda y, _: (jnp.sin(y) @ y, None)  # noqa: E731
        outer = lambda y, _: (jax.lax.scan(inner, y, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0]

    text = jax.jit(nested).lower(jnp.zeros((64, 64))).compile().as_text()
    assert sorted(count for count in trip_counts(text) if count is not None) == [3, 5]
