"""The parser of the command line, and options that are derived from the fields of `acestep_jax.request`."""

import argparse
import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonargparse

from acestep_jax.arguments import alternatives, arguments, describe, flag, repeatable, value_types
from acestep_jax.errors import InputError


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises `InputError`, with the nearest known option, where argparse would exit."""

    def __init__(self, **options: Any):
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)
        self.formatter_class = HelpFormatter

    def error(self, message: str, *_: Any) -> typing.NoReturn:
        raise InputError(explain(message, self.options()))

    def options(self) -> list[str]:
        """Return every option of this parser and of its subcommands."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, jsonargparse.ActionSubCommands):
                for name, parser in (action.choices or {}).items():
                    found += [name, *(parser.options() if isinstance(parser, Parser) else ())]
        return found


class HelpFormatter(argparse.HelpFormatter):
    """Help texts as they are written: they name the default themselves."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"max_help_position": 28} | options)


def explain(message: str, known: Iterable[str]) -> str:
    """Return an error message of argparse as one line of ours, with the nearest known option or command."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        option = found[1].partition("=")[0]
        near = difflib.get_close_matches(option, list(known), 1)
        return f"{option}: unknown option; " + (f"did you mean {near[0]}?" if near else "see --help")
    if found := re.match(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
        choices = [choice.strip(" '\"") for choice in found[3].split(",")]
        near = difflib.get_close_matches(found[2], choices, 1)
        advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        return f"{found[1]}: unknown value {found[2]!r}; {advice}"
    if found := re.match(r'expected "[\w.]*command" to be one of', message):
        return "COMMAND: missing; see --help"
    if found := re.match(r"argument (.+?): (.*)", message):
        return f"{found[1]}: {found[2]}"
    return message.strip().replace("\n", " ")


def add_fields(parser: Parser, kind: type) -> None:
    """Add an option for each field of `Request` or `Sampling` that has one. Values are text until `read_fields`."""
    for name, (field, about) in arguments(kind).items():
        if name == "prompt" or not (option := flag(name, about)):
            continue
        text = describe(name, kind).replace("%", "%%")
        if field.type is bool:
            parser.add_argument(option, dest=_key(name), action="store_true", help=text)
            continue
        metavar = about.metavar or ("S" if about.unit == "s" else "N" if _is_number(field.type) else option[2:].upper())
        action = "append" if repeatable(field.type) else "store"
        parser.add_argument(option, dest=_key(name), action=action, metavar=metavar, help=text)


def read_fields(options: Any, kind: type) -> dict[str, Any]:
    """Return the values of fields that were given, converted from text.

    Raises:
        InputError: if one is not a number where a number is expected, or a file cannot be read as text.
    """
    values: dict[str, Any] = {}
    for name, (field, about) in arguments(kind).items():
        text = options.get(_key(name))
        if text is None or text is False or text == []:
            continue
        if about.from_file and isinstance(text, str):
            text = text_or_file(text)
        texts = text if isinstance(text, list) else [text]
        found = [_convert(value, field.type, flag(name, about)) for value in texts]
        values[name] = found if isinstance(text, list) and (len(found) > 1 or _only_lists(field.type)) else found[0]
    return values


def name_flags(error: InputError, kinds: Iterable[type]) -> InputError:
    """Return the error with the options of the command line in place of the fields that its message begins with."""
    flags = {name: flag(name, about) for kind in kinds for name, (_, about) in arguments(kind).items()}
    subject, colon, rest = str(error).partition(":")
    names = subject.split(", ")
    if colon and all(flags.get(name) for name in names):
        return InputError(f"{', '.join(flags[name] for name in names)}:{rest}")
    return error


def text_or_file(text: str) -> str:
    """Return the text, or the content of the file whose name follows @."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{text[1:]}: not UTF-8 text ({error}); save it as UTF-8") from None


def _key(name: str) -> str:
    """Return where the parser keeps a field. Not under its name: that of one field may be the option of another."""
    return name if name == "prompt" else f"field_{name}"


def _is_number(kind: Any) -> bool:
    return bool(value_types(kind) & {int, float}) and str not in value_types(kind)


def _only_lists(kind: Any) -> bool:
    return all(part is types.NoneType or typing.get_origin(part) for part in alternatives(kind))


def _convert(value: Any, kind: Any, option: str) -> Any:
    if not isinstance(value, str) or not _is_number(kind):
        return value
    whole = float not in value_types(kind)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise InputError(f"{option}: expected a {'whole ' if whole else ''}number, found {value!r}") from None
