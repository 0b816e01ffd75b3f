"""What is read off the text of a compiled program."""

import pytest

from benchmarks import hlo

pytestmark = pytest.mark.unit

# Two products in a loop of three trips, whose weight is sliced out of a stack and copied, and one collective behind it.
TEXT = """HloModule jit_f, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%slice (p.0: bf16[3,8,8], p.1: s32[]) -> bf16[1,8,8] {
  %p.0 = bf16[3,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %sliced = bf16[1,8,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%times (p.2: bf16[4,8], p.3: bf16[1,8,8]) -> bf16[4,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %p.3 = bf16[1,8,8]{2,1,0} parameter(1)
  %flat = bf16[8,8]{1,0} bitcast(%p.3)
  ROOT %dot = bf16[4,8]{1,0} dot(%p.2, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carry: (s32[], bf16[4,8], bf16[3,8,8])) -> (s32[], bf16[4,8], bf16[3,8,8]) {
  %carry = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%carry), index=1
  %stack = bf16[3,8,8]{2,1,0} get-tuple-element(%carry), index=2
  %weight = bf16[1,8,8]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  %once = bf16[4,8]{1,0} fusion(%x, %weight), kind=kOutput, calls=%times
  %twice = bf16[4,8]{1,0} fusion(%once, %weight), kind=kOutput, calls=%times
  ROOT %out = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) tuple(%i, %twice, %stack)
}

%condition (state: (s32[], bf16[4,8], bf16[3,8,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (start: (s32[], bf16[4,8], bf16[3,8,8])) -> bf16[8,8] {
  %start = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) parameter(0)
  %loop = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[3,8,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %last = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %all = bf16[8,8]{1,0} all-gather(%last), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}
"""


def test_loops_are_multiplied_out():
    module = hlo.Module(TEXT)
    (loop,) = module.loops
    assert (loop.body, loop.trips, loop.runs) == ("body", 3, 3)
    assert module.scheduled == {"main", "body"} and module.runs["times"] == 6
    flops = sum(runs * module.dot_flops(c, i) for c, i, runs in module.schedule())
    assert flops == 3 * 2 * (2 * 4 * 8 * 8)


def test_a_trip_count_that_the_compiler_says():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.Module(text).loops[0].trips == 5
    unknown = TEXT.replace("direction=LT", "direction=NE")
    assert hlo.Module(unknown).loops[0].trips is None


def test_copies_and_what_they_read():
    module = hlo.Module(TEXT)
    body = module.computations["body"]
    assert [name for name, i in body.items() if module.only_moves(i)] == ["weight"]
    # A slice of the stack is read, not all of it.
    assert module.read_bytes(body, body["weight"]) == 8 * 8 * 2 + 4
    assert module.written_bytes(body["weight"]) == 8 * 8 * 2


def test_collectives_are_charged_for_what_they_send():
    """Of two devices each sends its half."""
    assert hlo.Module(TEXT).collective_seconds(link=64.0, devices=4) == 1.0


GATHER = "ROOT %all = bf16[8,8]{1,0} all-gather(%last), channel_id=1, replica_groups={{0,1}}, dimensions={0}"
# Other collectives of two devices over bf16[4,8], 64 bytes, and what each device sends of it.
OTHERS = {
    "ROOT %all = bf16[4,8] all-reduce(%last), channel_id=1, replica_groups={{0,1}}": 64,
    "ROOT %all = (bf16[4,8], bf16[4,8]) all-reduce(%last, %last), channel_id=1, replica_groups={{0,1}}": 128,
    "%all = (bf16[4,8], bf16[8,8]) all-gather-start(%last), channel_id=1, replica_groups={{0,1}}": 64,
    "ROOT %all = bf16[2,8] reduce-scatter(%last), channel_id=1, replica_groups={{0,1}}": 32,
    "ROOT %all = bf16[2,8] fusion(%last), kind=kCustom, calls=%all-reduce-scatter.1": 32,
}
SUM_AND_SLICE = """
%all-reduce-scatter.1 (whole: bf16[4,8]) -> bf16[2,8] {
  %whole = bf16[4,8]{1,0} parameter(0)
  %sum = bf16[4,8]{1,0} all-reduce(%whole), channel_id=2, replica_groups={{0,1}}
  ROOT %part = bf16[2,8]{1,0} slice(%sum), slice={[0:2], [0:8]}
}

ENTRY"""


@pytest.mark.parametrize(
    ("groups", "sent"),
    [
        ("{{0,1}}", 32),
        ("[4,2]<=[8]", 32),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}", 48),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 56),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 48),
    ],
)
def test_over_how_many_devices_a_collective_goes(groups, sent):
    """Of eight devices, all but its own part of 64 bytes."""
    line = f"ROOT %all = bf16[4,8] all-gather(%last), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    assert hlo.Module(TEXT.replace(GATHER, line)).collective_seconds(link=1.0, devices=8) == sent


@pytest.mark.parametrize("line", OTHERS)
def test_what_each_collective_sends(line):
    text = TEXT.replace(GATHER, line).replace("\nENTRY", SUM_AND_SLICE)
    assert hlo.Module(text).collective_seconds(link=1.0, devices=4) == OTHERS[line]


@pytest.mark.parametrize(("target", "written"), [("__gpu$xla.gpu.triton", 4 * 8 * 2), ("__cublas$gemm", 64 * 8 * 2)])
def test_what_a_kernel_updates_in_place(target, written):
    """A kernel of Pallas writes hardly any of it; a product that is added to its result, all."""
    shapes = "(bf16[4,8]{1,0}, bf16[64,8]{1,0})" if "triton" in target else "bf16[64,8]{1,0}"
    aliases = "{1}: (0, {})" if "triton" in target else "{}: (0, {})"
    call = f'custom-call(%cache), custom_call_target="{target}", output_to_operand_aliasing={{{aliases}}}'
    text = "HloModule m\n\nENTRY %main (cache: bf16[64,8]) -> bf16[64,8] {\n"
    text += f"  %cache = bf16[64,8]{{1,0}} parameter(0)\n  ROOT %call = {shapes} {call}\n}}\n"
    module = hlo.Module(text)
    assert module.written_bytes(module.computations["main"]["call"]) == written
