"""Parts of a step by name and by time: by hand, from traces as GPUs and TPUs write them, and from a real one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from cast_jax.core import profiling
from cast_jax.core.compiled import instructions
from cast_jax.core.config import build
from cast_jax.core.errors import UserError

HLO = """HloModule jit__step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %fusion.1 = (s32[], /*index=1*/f32[4]{0}) fusion(%p), metadata={op_name="jit(_step)/jvp(encoder)/while/body/mul"}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %while.7 = (s32[], /*index=1*/f32[4]{0}) while(%t), body=%body, metadata={op_name="jit(_step)/jvp(encoder)/while"}
  %copy.3 = f32[4]{0} copy(%a)
  %call.2 = f32[4]{0} call(%a), to_apply=%k, frontend_attributes={xla_cpu_small_call="true"}, metadata={op_name="x"}
  ROOT %gemm_fusion.2 = f32[4]{0} fusion(%a), metadata={source="a{b" op_name="jit(_step)/transpose(jvp(decoder))/dot"}
}
"""


OTHER = """HloModule jit_add

ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %fusion.1 = f32[4]{0} fusion(%a), metadata={op_name="jit(add)/optimizer/add"}
}
"""


class Program:
    def __init__(self, text: str = HLO) -> None:
        self.text = text

    def as_text(self) -> str:
        return self.text


def test_instructions_and_what_they_were_made_of():
    assert instructions(Program()) == (
        "jit__step",
        {
            "fusion.1": "jit(_step)/jvp(encoder)/while/body/mul",
            "while.7": None,
            "copy.3": "",
            "call.2": "x",
            "gemm_fusion.2": "jit(_step)/transpose(jvp(decoder))/dot",
        },
    )


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(_step)/jvp(encoder)/mlp/dot_general", ("encoder", "forward")),
        ("jit(_step)/jvp()/jit(encoder)/dot_general", ("other", "forward")),  # a function of that name, no scope
        ("jit(_step)/transpose(jvp(criterion))/matching/while/body/sub", ("matching", "backward")),
        ("jit(_step)/vmap(jvp(mask_decoder))/add", ("mask_decoder", "forward")),
        ("jit(_step)/transpose(jvp(encoder))/rematted_computation/mlp/dot", ("encoder", "recomputed")),
        ("jit(_step)/transpose(jvp(encoder))/transpose(jvp())/dot", ("encoder", "backward")),
        (
            "transpose(jvp(encoder))/transpose(transpose(jvp(encoder)))/rematted_computation/jvp()/dot",
            ("encoder", "backward"),
        ),
        ("jit(_step)/jvp(contrastive)/while/body/vmap(transpose(jvp()))/mul", ("contrastive", "backward")),
        ("rematted_computation/vmap(transpose(transpose(jvp(encoder))))/mul", ("encoder", "backward")),
        ("jit(_step)/jvp(online_labels)/encoder/mlp/dot_general", ("online_labels", "forward")),  # not the student's
        ("jit(_step)/optimizer/mul", ("optimizer", "forward")),
        ("", ("other", "forward")),
    ],
)
def test_the_part_of_an_operation(path, part):
    assert profiling.part_of(path) == part


GPU = """
planes {{ name: "/host:CPU" lines {{ name: "python" events {{ metadata_id: 1 duration_ps: 9000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "fusion.1" }} }} }}
planes {{ name: "/device:GPU:{device}"
  lines {{ name: "Stream #13" timestamp_ns: 1
    events {{ metadata_id: 1 offset_ps: 0 duration_ps: 3000000 stats {{ metadata_id: 1 str_value: "fusion.1" }}
              stats {{ metadata_id: 2 str_value: "jit__step" }} }}
    events {{ metadata_id: 1 offset_ps: 4000000 duration_ps: 3000000 stats {{ metadata_id: 1 str_value: "fusion.1" }}
              stats {{ metadata_id: 2 str_value: "jit__step" }} }}
    events {{ metadata_id: 2 duration_ps: 5000000 stats {{ metadata_id: 1 str_value: "gemm_fusion.2" }}
              stats {{ metadata_id: 2 str_value: "jit__step" }} }}
    events {{ metadata_id: 1 duration_ps: 7000000 stats {{ metadata_id: 1 str_value: "fusion.1" }}
              stats {{ metadata_id: 2 str_value: "jit_add" }} }}
    events {{ metadata_id: 3 duration_ps: 1000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "loop_fusion_1" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "sm90_gemm" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2D" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_module" }} }} }}
"""
TPU = """
planes { name: "/device:TPU:0"
  lines { name: "XLA Modules"
    events { metadata_id: 4 offset_ps: 1000000 duration_ps: 90000000 }
    events { metadata_id: 5 offset_ps: 91000000 duration_ps: 7000000 } }
  lines { name: "XLA Ops"
    events { metadata_id: 3 offset_ps: 1000000 duration_ps: 20000000 }
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 6000000 }
    events { metadata_id: 2 offset_ps: 7000000 duration_ps: 5000000 }
    events { metadata_id: 1 offset_ps: 92000000 duration_ps: 4000000 } }
  event_metadata { key: 1 value { id: 1 name: "%fusion.1 = (s32[], f32[4]{0}) fusion(%p)" } }
  event_metadata { key: 2 value { id: 2 name: "%gemm_fusion.2 = f32[4]{0} fusion(%a)" } }
  event_metadata { key: 3 value { id: 3 name: "%while.7 = (s32[], f32[4]{0}) while(%t)" } }
  event_metadata { key: 4 value { id: 4 name: "jit__step(17)" } }
  event_metadata { key: 5 value { id: 5 name: "jit_add(18)" } } }
"""


def write_trace(folder: Path, text: str) -> None:
    (folder / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))


@pytest.mark.parametrize("text", [GPU.format(device=0), TPU], ids=["gpu", "tpu"])
def test_traces_of_accelerators(tmp_path, text):
    """Loops and what holds them do not count; nor do other programs, copies and the host."""
    write_trace(tmp_path, text)
    seconds = profiling.by_part(profiling.operation_seconds(tmp_path, [Program()]))
    assert seconds == {
        "encoder": {"forward": pytest.approx(6e-6), "backward": 0, "recomputed": 0},
        "decoder": {"forward": 0, "backward": pytest.approx(5e-6), "recomputed": 0},
    }


@pytest.mark.parametrize(("text", "microseconds"), [(GPU.format(device=0), 7), (TPU, 4)], ids=["gpu", "tpu"])
def test_programs_may_name_their_instructions_alike(tmp_path, text, microseconds):
    write_trace(tmp_path, text)
    seconds = profiling.operation_seconds(tmp_path, [Program(), Program(OTHER)])
    assert seconds["jit(add)/optimizer/add"] == pytest.approx(1e-6 * microseconds)
    assert seconds["jit(_step)/jvp(encoder)/while/body/mul"] == pytest.approx(6e-6)


def test_devices_are_averaged(tmp_path):
    write_trace(tmp_path, GPU.format(device=0) + GPU.format(device=1))
    seconds = profiling.operation_seconds(tmp_path, [Program()])
    assert sum(seconds.values()) == pytest.approx(11e-6)


def test_the_last_of_several_traces_counts(tmp_path):
    for hour in (1, 2):
        (tmp_path / str(hour)).mkdir()
        write_trace(tmp_path / str(hour), GPU.format(device=0))
        os.utime(tmp_path / str(hour) / "host.xplane.pb", (hour, hour))
    assert sum(profiling.operation_seconds(tmp_path, [Program()]).values()) == pytest.approx(11e-6)


def test_a_trace_without_the_program_is_refused(tmp_path):
    write_trace(tmp_path, GPU.format(device=0).replace("jit__step", "jit_other"))
    with pytest.raises(UserError, match="no operation of jit__step was traced"):
        profiling.operation_seconds(tmp_path, [Program()])


def test_a_trace_of_this_machine(tmp_path):
    """A loop of products takes most of the time, and its operations count as often as they run."""

    def run(x, w):
        with jax.named_scope("encoder"):
            x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=20)
        with jax.named_scope("decoder"):
            return x.sum(axis=0) * 2

    x = jnp.full((256, 256), 0.1)
    program = jax.jit(run).lower(x, x).compile()
    jax.block_until_ready(program(x, x))
    with profiling.tracing(tmp_path):
        jax.block_until_ready(program(x, x))
    parts = profiling.by_part(profiling.operation_seconds(tmp_path, [program]))
    assert 20 * 1e-5 < parts["encoder"]["forward"] < 10.0  # 20 products of 34 MFLOP
    assert 0 < parts["decoder"]["forward"] < parts["encoder"]["forward"]


@pytest.mark.parametrize(
    ("device", "flops", "transfer"),
    [
        ("NVIDIA H200", 989.0, 4.8),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA H100 80GB HBM3", 989.0, 3.352),
        ("NVIDIA H100 PCIe", 756.0, 2.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 2.039),
        ("NVIDIA A100 80GB PCIe", 312.0, 1.935),
        ("NVIDIA A100-SXM4-40GB", 312.0, 1.555),
        ("NVIDIA L4", 121.0, 0.3),
        ("NVIDIA L40S", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 1.008),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("TPU v4", 275.0, 1.228),
        ("TPU v5 lite", 197.0, 0.819),
        ("TPU v5", 459.0, 2.765),
        ("TPU v5p", 459.0, 2.765),
        ("TPU v6 lite", 918.0, 1.64),
        ("cpu", None, None),
    ],
)
def test_peaks(device, flops, transfer):
    assert profiling.peaks(device) == tuple(peak and pytest.approx(1e12 * peak) for peak in (flops, transfer))


def test_faulty_settings_are_named():
    with pytest.raises(UserError, match=re.escape("config.profile.steps is -1; it must lie in [0, 1000]")):
        build(profiling.ProfileConfig, {"steps": -1}, "config.profile")
