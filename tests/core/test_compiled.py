"""What a compiled program's text says of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core.compiled import collective_bytes, launches, traffic

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %part = f32[8]{0} all-gather(%x), dimensions={0}
  %fused = f32[8]{0} fusion(%part), kind=kLoop, calls=%add, metadata={op_name="jit(step)/encoder/add"}
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %total = f32[4]{0} all-reduce(%x), to_apply=%add
  %loop = (s32[], f32[8]) while(%tuple), condition=%test, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%test (state: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%rare (x: f32[2]) -> f32[2] {
  %moved = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%never (x: f32[2]) -> f32[2] {
  ROOT %copy = f32[2]{0} copy(%x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %first = f32[4]{0} all-reduce(%x), to_apply=%add
  %layers = (s32[], f32[4]) while(%t), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %until = (s32[], f32[4]) while(%t), condition=%test, body=%inner
  ROOT %choice = f32[2] conditional(%p, %a, %b), branch_computations={%rare, %never}
}
"""


class Program:
    def as_text(self) -> str:
        return TEXT


def test_what_a_loop_sends_counts_as_often_as_it_turns():
    assert collective_bytes(Program()) == {
        "all-reduce": 4 * 4 * (1 + 12),
        "all-gather": 4 * 8 * (12 * 3 + 1),
        "collective-permute": 4 * 2,
    }


def test_kernels_are_counted_as_often_as_they_run():
    inner, condition = 12 * 3 + 1, 1  # of the loop of unknown length, once; the others' are not computed
    once = {"first": 1, "both branches": 2}
    assert launches(Program()) == {
        "": 12 + inner + condition + sum(once.values()),
        "jit(step)/encoder/add": inner,
    }


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


def test_what_kernels_read_and_write():
    """Of what is sliced or changed in place only the part."""
    program = type("Program", (), {"as_text": lambda _: MOVING})()
    row, whole = 4 * 8, 4 * 12 * 8
    assert traffic(program) == {
        "read": 12 * (row + 4 + row),
        "write": 12 * (row + 4 + row),
        "all": whole + whole + 12 * 8,
        "some": 2 * 4 * row,
        "product": 2 * whole + 4 * 12 * 12,
    }


def test_what_a_real_loop_reads_and_writes():
    """Products with one of twelve matrices a turn, each of which is read once."""

    def run(x, matrices):
        return jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), None), x, matrices)[0]

    x, matrices = jnp.ones((4, 256)), jnp.ones((12, 256, 256))
    moved = sum(traffic(jax.jit(run).lower(x, matrices).compile()).values())
    assert moved == pytest.approx(3 * matrices.nbytes, rel=0.1)  # to slice a matrix, and to multiply by it
