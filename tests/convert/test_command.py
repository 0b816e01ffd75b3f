"""The command line of conversion: what it needs, and the scales of adapters."""

import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from acestep_jax import InputError
from acestep_jax.cli import convert
from acestep_jax.cli.options import add_lora, lora_scales
from acestep_jax.convert import __main__ as command_line

COMMANDS = ["from-torch", "to-torch", "verify", "lora-from-torch", "lora-to-torch", "merge-lora", "random-torch"]


def test_help_needs_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['convert', '--help']\n"
        "try:\n    runpy.run_module('acestep_jax.convert', run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def parse(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    convert.add(parser.add_subcommands(required=True, dest="command", metavar="COMMAND"))
    return parser.parse_args(["convert", *arguments]).convert


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main([command, "--help"])
    assert not done.value.code and "DST" in capsys.readouterr().out or command == "verify"


def test_options_of_the_source():
    options = parse("from-torch", "a", "b", "--vae", "v", "--text-encoder", "t", "--dtype", "bfloat16")
    assert options.command == "from-torch"
    given = options["from-torch"]
    assert (given.source, given.destination, given.vae, given.text_encoder, given.dtype) == (
        "a",
        "b",
        "v",
        "t",
        "bfloat16",
    )


def scales(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    add_lora(parser)
    return lora_scales(parser.parse_args(list(arguments)))


A, B = ("--lora", "a"), ("--lora", "1")
SCALES = [
    ((), ([], [])),
    (A, (["a"], [1.0])),
    ((*A, *B, "--lora-scale", "0.5"), (["a", "1"], [0.5, 0.5])),
    ((*A, "--lora-scale", "0.5", *B, "--lora-scale", "-2"), (["a", "1"], [0.5, -2.0])),
    (("--lora-scale=0.25", "--lora-scale=0", *A, *B), (["a", "1"], [0.25, 0.0])),
]


@pytest.mark.parametrize("arguments, expected", SCALES)
def test_scales_of_adapters(arguments, expected):
    assert scales(*arguments) == expected


BAD_SCALES = [
    (("--lora-scale", "0.5"), "--lora-scale: found 0.5 without an adapter"),
    ((*A, "--lora-scale", "x"), "--lora-scale: expected a finite number such as 0.8, found 'x'"),
    ((*A, "--lora-scale", "nan"), "--lora-scale: expected a finite number such as 0.8, found 'nan'"),
    ((*A, "--lora-scale", "1", "--lora-scale", "2"), "one for each of the 1 --lora, found 2"),
]


@pytest.mark.parametrize("arguments, message", BAD_SCALES)
def test_bad_scales_of_adapters(arguments, message):
    with pytest.raises(InputError, match=message):
        scales(*arguments)
