"""The device memory that a song needs, found by compiling its programs for devices that are not present.

`python -m benchmarks.device_memory --device t4 l4 a100 h100` needs `jax[cuda12]`, `--device v5e v6e` needs `jax[tpu]`;
neither needs the device. It prints, for one song, the temporary and output memory of the denoising and decoding
programs in the precision that `precision_for` chooses for the device. `acestep_jax.memory` holds these figures, and
`--table` prints which models fit on which devices according to them.
"""

import argparse

# Imported first, because they prepare the environment for JAX.
from benchmarks import aot  # isort: skip
from benchmarks.targets import devices_of, make_mesh, target_of  # isort: skip

from acestep_jax import memory as budget
from acestep_jax.cli.info import fits
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.models.runtime import Runtime
from benchmarks.floor import FRAMES_PER_SECOND, TRANSFORMER_SIZES
from benchmarks.programs import decode_program, denoise_program

TPUS = ("v5e", "v6e")
GPUS = ("t4", "l4", "a100", "h100")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", nargs="+", choices=(*GPUS, *TPUS), default=[], help="devices to compile for")
    add("--table", action="store_true", help="print which models fit where, from the figures in acestep_jax.memory")
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
        target = target_of(name)
        mesh = make_mesh(devices_of(f"{name}:1x1" if name in TPUS else name), None, 1)
        runtime = Runtime.of(target.precision)
        for seconds in options.seconds:
            frames = BUCKETS.frames_of(round(seconds * FRAMES_PER_SECOND))
            programs = [denoise_program(options, mesh, s, frames, options.batch, runtime) for s in options.size]
            for program in (*programs, decode_program(mesh, frames, options.batch, runtime)):
                found = aot.compile_program(program, mesh, target)
                sizes = (f"{size / 1e9:.3f}" for size in (found.arguments, found.temporary, found.output))
                print(
                    f"| {name} | {target.precision} | {program.name} | {seconds:g} s | {' | '.join(sizes)} |",
                    flush=True,
                )


def table() -> list[str]:
    """Return the lines of a Markdown table: the memory that songs need, and where they fit."""
    songs = " / ".join(f"{seconds:g}" for seconds in budget.SECONDS)
    head = ("device", "JAX may take GB", "dtype", "model", "weights GB", f"{songs} s need GB", "in turn GB", "result")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in (*GPUS, *TPUS):
        target = target_of(name)
        platform, size, precision = "tpu" if name in TPUS else "gpu", target.usable, target.precision
        for model in budget.SIZES:
            configs = budget.configs_of(model)
            weights = sum(budget.weight_bytes(configs, precision).values())
            whole = [budget.needed_bytes(configs, precision, platform, s) for s in budget.SECONDS]
            turns = [budget.needed_in_turn(configs, precision, platform, s) for s in budget.SECONDS]
            cells = (name.upper() if name in GPUS else name, f"{size / 1e9:.1f}", precision, model)
            figures = (" / ".join(f"{n / 1e9:.1f}" for n in sizes) for sizes in ([weights], whole, turns))
            verdict = fits(whole, turns, int(size), in_turn=True)
            lines.append("| " + " | ".join((*cells, *figures, verdict)) + " |")
    return lines


if __name__ == "__main__":
    main()
