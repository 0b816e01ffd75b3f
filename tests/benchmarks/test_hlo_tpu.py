"""What a TPU's kernels are charged for."""

import pytest

from benchmarks import hlo, hlo_tpu

pytestmark = pytest.mark.unit

T, S, HEADS = 768, 512, 16
TEXT = """ENTRY %main (q: bf16[2,16,768,128], k: bf16[2,8,S,128], lists: s8[1,A,B]) -> bf16[2,16,768,128] {{
  %q = bf16[2,16,768,128] parameter(0)
  %k = bf16[2,8,{keys},128] parameter(1)
  %lists = s8[{lists}] parameter(2)
  ROOT %splash_mha_{kind}.1 = ({results}) custom-call(%lists, %q, %k, %k), custom_call_target="tpu_custom_call", {sizes}
}}
"""
FORWARD, WINDOWED = "1,1,1", "1,3,5"
# Kind, keys, lists, results, sizes of blocks: products of scores' size, queries and keys that each sees.
KERNELS = {
    "forward": (("fwd", S, FORWARD, "bf16[2,16,768,128]", dict(block_kv=512)), (2, T, S)),
    "of a window": (("fwd", T, WINDOWED, "bf16[2,16,768,128]", dict(block_kv=128)), (2, T, 5 * 128)),
    "backward, in one": (
        ("dkv", S, FORWARD, "bf16[2,1,16,768,128], bf16[2,8,512,128], bf16[2,8,512,128]", dict(block_q_dkv=768)),
        (5, T, S),
    ),
    "backward of a window, keys and values": (
        ("dkv", T, "1,2,6", "bf16[2,8,768,128], bf16[2,8,768,128]", dict(block_q_dkv=256)),
        (4, 2 * 256, T),
    ),
    "backward of a window, queries": (
        ("dq", T, WINDOWED, "bf16[2,16,768,128]", dict(block_kv_dq=128)),
        (3, T, 5 * 128),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_attention_is_charged_for_the_blocks_that_it_visits(name):
    (kind, keys, lists, results, sizes), (products, queries, seen) = KERNELS[name]
    entries = ", ".join(f'\\"{key}\\": {value}' for key, value in sizes.items())
    metadata = f'kernel_metadata={{"xprof_metadata":"{{{entries}}}"}}'
    text = TEXT.format(kind=kind, keys=keys, lists=lists, results=results, sizes=metadata)
    module = hlo.Module(text)
    body = module.computations["main"]
    kernel = next(i for i in body.values() if i.root)
    assert hlo_tpu.kernel_flops(body, kernel) == 2 * products * 2 * HEADS * 128 * queries * seen
