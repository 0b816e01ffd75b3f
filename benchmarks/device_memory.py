"""What a song takes of a device's memory, by compiling its programs for devices that are not present.

`python -m benchmarks.device_memory --device t4 l4 a100 h100` needs `jax[cuda12]`, `--device v5e v6e` needs `jax[tpu]`;
neither needs the device. Prints, for one song, the temporary memory and the result of the denoising and the decoding
program in the precision that `precision_for` gives the device. `acestep_jax.memory` holds these figures, and `--table`
prints what follows from them: which models fit which devices.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # that there is a driver

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from acestep_jax import memory as budget
from acestep_jax.cli.info import fits
from acestep_jax.distributed import MESH_AXES
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.models.config import Runtime
from acestep_jax.models.kernels import attention
from acestep_jax.models.kernels.platform import precision_for
from benchmarks.floor import FRAMES_PER_SECOND, TRANSFORMER_SIZES
from benchmarks.tpu_aot import topology_devices
from benchmarks.tpu_programs import Program, decode_program, denoise_program

TPUS = {"v5e": 16e9, "v6e": 32e9}  # memory of a chip
GPU_FRACTION = 0.75  # of a GPU's memory, what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# Of data sheets: compute capability, multiprocessors, shared memory of each and of a block at most, threads of a
# multiprocessor, float32 units of each, memory bandwidth, level 2 cache, clock in GHz, memory. Bytes (a second).
CARDS = {
    "t4": (7.5, 40, 65536, 65536, 1024, 64, 320e9, 4 << 20, 1.59, 15.8e9),
    "l4": (8.9, 58, 102400, 101376, 1536, 128, 300e9, 48 << 20, 2.04, 24e9),
    "a100": (8.0, 108, 167936, 166912, 2048, 64, 1555e9, 40 << 20, 1.41, 40e9),
    "h100": (9.0, 132, 233472, 232448, 2048, 128, 3352e9, 50 << 20, 1.98, 80e9),
}
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{name}" runtime_version: "12.8.0" driver_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", nargs="+", choices=(*CARDS, *TPUS), default=[], help="devices to compile for")
    add("--table", action="store_true", help="print what fits where, from the figures in acestep_jax.memory")
    add("--size", nargs="+", choices=TRANSFORMER_SIZES, default=list(TRANSFORMER_SIZES), help="transformers [all]")
    add("--seconds", type=float, nargs="+", default=[60, 240, 600], help="lengths of audio [60 240 600]")
    add("--batch", type=int, default=1, help="number of songs [1]")
    add("--condition-tokens", type=int, default=512, help="number of tokens to attend to [512]")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table()))
        return
    options.layers = None
    print("| device | precision | program | audio | arguments GB | temporary GB | output GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.device:
        mesh, precision = target(name)
        runtime = Runtime.of(precision)
        for seconds in options.seconds:
            frames = BUCKETS.frames_of(round(seconds * FRAMES_PER_SECOND))
            programs = [denoise_program(options, mesh, s, frames, options.batch, runtime) for s in options.size]
            for program in (*programs, decode_program(mesh, frames, options.batch, runtime)):
                figures = (f"{size / 1e9:.3f}" for size in memory(program, mesh, name))
                print(f"| {name} | {precision} | {program.name} | {seconds:g} s | {' | '.join(figures)} |", flush=True)


def table() -> list[str]:
    """Return the lines of a table in Markdown: what songs need, and how they fit."""
    songs = " / ".join(f"{seconds:g}" for seconds in budget.SECONDS)
    head = ("device", "JAX may take GB", "dtype", "model", "weights GB", f"{songs} s need GB", "in turn GB", "result")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in (*CARDS, *TPUS):
        if name in TPUS:
            platform, size, capability = "tpu", TPUS[name], 0.0
        else:
            platform, size, capability = "gpu", CARDS[name][-1] * GPU_FRACTION, CARDS[name][0]
        precision = precision_for(platform, capability)
        for model in budget.SIZES:
            configs = budget.configs_of(model)
            weights = sum(budget.weight_bytes(configs, precision).values())
            whole = [budget.needed_bytes(configs, precision, platform, s) for s in budget.SECONDS]
            turns = [budget.needed_in_turn(configs, precision, platform, s) for s in budget.SECONDS]
            cells = (name.upper() if name in CARDS else name, f"{size / 1e9:.1f}", precision, model)
            figures = (" / ".join(f"{n / 1e9:.1f}" for n in sizes) for sizes in ([weights], whole, turns))
            verdict = fits(whole, turns, int(size), in_turn=True)
            lines.append("| " + " | ".join((*cells, *figures, verdict)) + " |")
    return lines


def target(name: str) -> tuple[Mesh, str]:
    """Return a mesh of one device that is not present, and its precision."""
    if name in TPUS:
        devices, precision = topology_devices(f"{name}:1x1"), precision_for("tpu", 0)
    else:
        capability, cores, shared, block, threads, units, bandwidth, cache, clock, size = CARDS[name]
        text = GPU_TARGET.format(
            name=name.upper(), major=int(capability), minor=round(capability * 10) % 10, cores=cores, shared=shared,
            block=block, threads=threads, units=units, bandwidth=int(bandwidth), cache=cache, clock=clock,
            memory=int(size),
        )  # fmt: skip
        topology = topologies.get_topology_desc("", platform="cuda", target_config=text, topology="1x1x1")
        devices, precision = list(topology.devices), precision_for("gpu", capability)
        attention.compute_capability = lambda: capability  # the library asks the device that is attached
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return mesh, precision


def memory(program: Program, mesh: Mesh, name: str) -> tuple[int, int, int]:
    """Compile a program; return the bytes of its arguments, temporaries and results."""
    platforms = ("tpu",) if name in TPUS else ("cuda",)
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments, **program.static)
        found = traced.lower(lowering_platforms=platforms).compile().memory_analysis()
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes, found.temp_size_in_bytes, output


if __name__ == "__main__":
    main()
