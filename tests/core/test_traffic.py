"""What kernels read and write, by a program's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core.traffic import traffic

MOVING = """HloModule jit_step, is_scheduled=true

%one_row (all: f32[12,8], which: s32[]) -> f32[8] {
  %all = f32[12,8]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %same = f32[12,8]{1,0} bitcast(%all)
  %row = f32[1,8]{1,0} dynamic-slice(%same, %which, %zero), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%written_row (all: f32[12,8], row: f32[1,8], which: s32[]) -> f32[12,8] {
  %all.1 = f32[12,8]{1,0} parameter(0)
  %row.1 = f32[1,8]{1,0} parameter(1)
  %which.1 = s32[] parameter(2)
  ROOT %changed = f32[12,8]{1,0} dynamic-update-slice(%all.1, %row.1, %which.1, %zero.1)
}

%everything (all: f32[12,8]) -> (f32[12,8], pred[12,8]) {
  %all.2 = f32[12,8]{1,0} parameter(0)
  %row.2 = f32[1,8]{1,0} slice(%all.2), slice={[0:1], [0:8]}
  %positive = pred[12,8]{1,0} compare(%all.2, %zeros), direction=GT
  ROOT %both = (f32[12,8]{1,0}, pred[12,8]{1,0}) tuple(%all.2, %positive)
}

%body (state: (f32[12,8], s32[])) -> (f32[12,8], s32[]) {
  %state = (f32[12,8]{1,0}, s32[]) parameter(0)
  %rows = f32[12,8]{1,0} get-tuple-element(%state), index=0
  %turn = s32[] get-tuple-element(%state), index=1
  %read = f32[8]{0} fusion(%rows, %turn), kind=kLoop, calls=%one_row, metadata={op_name="read"}
  %write = f32[12,8]{1,0} fusion(%rows, %read, %turn), kind=kLoop, calls=%written_row, metadata={op_name="write"}
  ROOT %next = (f32[12,8]{1,0}, s32[]) tuple(%write, %turn)
}

ENTRY %main (x: f32[12,8]) -> f32[12,8] {
  %x = f32[12,8]{1,0} parameter(0)
  %layers = (f32[12,8]{1,0}, s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %all.3 = (f32[12,8]{1,0}, pred[12,8]{1,0}) fusion(%x), kind=kLoop, calls=%everything, metadata={op_name="all"}
  %some = f32[4,8]{1,0} slice(%x), slice={[0:4], [0:8]}, metadata={op_name="some"}
  ROOT %product = f32[12,12]{1,0} dot(%x, %x), metadata={op_name="product"}
}
"""


def moved(text: str) -> dict[str, int]:
    return traffic(type("Program", (), {"as_text": lambda _: text})())


def test_what_kernels_read_and_write():
    """Of what is sliced or changed in place only the part."""
    row, whole = 4 * 8, 4 * 12 * 8
    assert moved(MOVING) == {
        "read": 12 * (row + 4 + row),
        "write": 12 * (row + 4 + row),
        "all": whole + whole + 12 * 8,
        "some": 2 * 4 * row,
        "product": 2 * whole + 4 * 12 * 12,
    }


FUSED = """HloModule jit_step, is_scheduled=true

%fused (p: f32[1024], i: s32[]) -> f32[1024] {{
  %p = f32[1024]{{0}} parameter(0)
  %i = s32[] parameter(1)
{body}
}}

ENTRY %main (x: f32[1024]) -> f32[1024] {{
  ROOT %done = f32[1024]{{0}} fusion(%x, %j), kind=kLoop, calls=%fused, metadata={{op_name="done"}}
}}
"""
UPDATE = "f32[1024]{0} dynamic-update-slice"
CAST, NEW = "%cast = bf16[1024]{0} convert(%p)\n", "%new = f32[8]{0} constant(0)\n"


@pytest.mark.parametrize(
    ("body", "read", "written"),
    [
        ("ROOT %cast = bf16[1024]{0} convert(%p)", 4096, 2048),
        ("ROOT %turned = f32[2,512]{0,1} transpose(%p)", 4096, 4096),
        (CAST + "ROOT %sum = bf16[1024]{0} add(%cast, %cast)", 4096, 2048),
        (CAST + "ROOT %some = bf16[8]{0} slice(%cast), slice={[0:8]}", 4 * 8, 2 * 8),
        (NEW + f"ROOT %changed = {UPDATE}(%p, %new, %i)", 4, 32),
        (NEW + f"%changed = {UPDATE}(%p, %new, %i)\nROOT %less = f32[1024]{{0}} negate(%changed)", 4100, 4096),
        (NEW + f"%all = f32[1024]{{0}} broadcast(%zero)\nROOT %changed = {UPDATE}(%all, %new, %i)", 4, 4096),
    ],
    ids=["cast", "transposed", "cast and added", "cast and sliced", "in place", "not at last", "of nothing"],
)
def test_what_is_passed_on_within_a_kernel(body, read, written):
    """Beside the index, which is read where it is used."""
    assert moved(FUSED.format(body=body)) == {"done": read + written}


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("(f32[32,32]{1,0}, s8[33554432]{0}) custom-call(%x, %x)", 2 * 4096 + 4096),
        ("(f32[32,32]{1,0}, f32[32,32]{1,0}, u32[]) copy-start(%x)", 4096 + 4096 + 4),
        ("(f32[32,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%x)", 4096 + 2 * 4096),
    ],
)
def test_workspaces_and_what_is_named_twice_do_not_count(instruction, expected):
    body = f"  %x = f32[32,32]{{1,0}} parameter(0)\n  %one = {instruction}\n"
    text = f"HloModule jit_step\n\nENTRY %main (x: f32[32,32]) -> f32[32,32] {{\n{body}}}\n"
    assert moved(text) == {"": expected}


def test_what_a_real_loop_reads_and_writes():
    """Products with one of twelve matrices a turn, each of which is read once."""

    def run(x, matrices):
        return jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), None), x, matrices)[0]

    x, matrices = jnp.ones((4, 256)), jnp.ones((12, 256, 256))
    total = sum(traffic(jax.jit(run).lower(x, matrices).compile()).values())
    assert total == pytest.approx(3 * matrices.nbytes, rel=0.1)  # to slice a matrix, and to multiply by it


def test_what_a_real_cast_reads_and_writes():
    program = jax.jit(lambda x: x.astype(jnp.bfloat16)).lower(jnp.ones((256, 256))).compile()
    assert sum(traffic(program).values()) == 256 * 256 * (4 + 2)
