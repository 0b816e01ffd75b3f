"""The parser of the command line, and options that are derived from the fields of `acestep_jax.request`."""

import argparse
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from acestep_jax.arguments import alternatives, arguments, describe, flag, repeatable, value_types
from acestep_jax.errors import InputError, nearest
from acestep_jax.request import KINDS


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises a readable `InputError`, with the nearest known option, where argparse would exit.

    The main program calls `finish` once all options are added.

    Args:
        kinds: descriptions of the values of options that jsonargparse converts, such as "a whole number", by name.
    """

    def __init__(self, *, kinds: Mapping[str, str] | None = None, **options: Any):
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)
        self.formatter_class = HelpFormatter
        self._kinds = dict(kinds or {})
        self._needed: list[argparse.Action] = []

    def finish(self) -> None:
        """Spell every option of this parser and its commands with dashes; also accept underscores."""
        # jsonargparse clears `required` while it parses.
        self._needed = [action for action in self._actions if action.required and not _is_command(action)]
        for action in self._actions:
            dashed = [option.replace("_", "-") for option in action.option_strings]
            self._option_string_actions |= dict.fromkeys(dashed, action)
            action.option_strings = dashed
            if isinstance(action, jsonargparse.ActionSubCommands):
                for parser in typing.cast(dict[str, Parser], action.choices or {}).values():
                    parser.finish()

    def parse_args(self, args=None, namespace=None, env=None, defaults=True, **options) -> jsonargparse.Namespace:
        """Parse the options; raise InputError for an unknown or missing one."""
        if not any(map(_is_command, self._actions)):
            options.pop("_skip_validation", None)  # with it, the main program would report errors late
        values = super().parse_args(args, namespace, env, defaults, **options)
        if missing := [action for action in self._needed if values.get(action.dest) is None]:
            names = [action.option_strings[0] if action.option_strings else str(action.metavar) for action in missing]
            raise InputError(f"{', '.join(names)}: missing; {self._advice}")
        return values

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        """Raise InputError with a readable form of the library's message."""
        words = self.args or ()
        files = [value for option, value in itertools.pairwise(words) if option == "--config"]
        files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
        where = f" (settings come from {', '.join(files)} and the command line)" if files else ""
        explained = self._explain(message)
        end = where if "; " in explained else f"{where}; {self._advice}"
        raise InputError(f"{explained}{end}") from ex

    @property
    def _advice(self) -> str:
        return f"`{self.prog.replace(' [options]', '')} --help` lists all options"

    def _explain(self, message: str) -> str:
        """Return a readable form of an error message, with advice only if there is a similar name."""
        if found := re.search(r'Parser key "([\w.]+)"(?: element \d+)?:\s*(.*)', message, re.DOTALL):
            name, rest = found.groups()
            value = re.search(r"(?:Got|Given) value: ([^\n]*)", rest)
            if value and name in self._kinds:
                return f"--{_dashed(name)}: expected {self._kinds[name]}, found {value[1]}"
            return f"--{_dashed(name)}: {' '.join(rest.split())}"
        if found := re.match(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            choices = [choice.strip(" '\"") for choice in found[3].split(",")]
            return f"{found[1]}: unknown value {found[2]!r}; {nearest(found[2], choices)}"
        if re.match(r'expected "[\w.]*command" to be one of', message):
            return "COMMAND: missing"
        if found := re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL):
            return f"{found[1]}: {found[2]}"
        if found := re.fullmatch(r"unrecognized arguments: (--[^\s=]+)?(.*)", message, re.DOTALL):
            if found[1] is None:
                return f"unexpected argument {found[2]}"
            near = self._nearest(found[1])
            return f"{found[1]}: unknown option" + (f"; did you mean {' or '.join(near)}?" if near else "")
        group = r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.-]+)'(?: is not accepted)?"
        if found := re.fullmatch(group, message):  # of a settings file
            name = ".".join(filter(None, found.groups()))
            near = [option[2:].replace("-", "_") for option in self._nearest(f"--{_dashed(name)}")]
            return f"{name}: unknown setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
        return " ".join(message.split())

    def _nearest(self, option: str) -> list[str]:
        """Return the options nearest to an unknown one: options with the same last part, else the most similar one."""
        known = [spelling for action in self._actions for spelling in action.option_strings if spelling != "-h"]
        lasts = {one.strip("-").rpartition(".")[2]: one for one in known}
        last = _dashed(option).strip("-").rpartition(".")[2]
        near = [one for one in known if one.strip("-").rpartition(".")[2] == last]
        near = near or difflib.get_close_matches(_dashed(option), known, n=1)
        return near or [lasts[one] for one in difflib.get_close_matches(last, lasts, n=1)]


def _is_command(action: argparse.Action) -> bool:
    return isinstance(action, jsonargparse.ActionSubCommands)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class HelpFormatter(argparse.HelpFormatter):
    """Prints help texts unchanged, because they name the default themselves."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"max_help_position": 28} | options)


class _Switch(argparse.Action):
    """--x for true, --no-x for false; unlike an option with a value, they never consume the next word."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, "false" if str(option_string).startswith("--no-") else "true")


def add_fields(parser: Parser, kind: type, names: Iterable[str] | None = None) -> None:
    """Add an option for each field of a dataclass in `request.KINDS`, if the field has one. Values are text until
    `read_fields`.

    Args:
        names: names of the fields; None: all.
    """
    for name, (field, about) in arguments(kind).items():
        if name == "prompt" or not (option := flag(name, about)) or (names is not None and name not in names):
            continue
        text = _with_flags(describe(name, kind)).replace("%", "%%")
        if value_types(field.type) == {bool}:
            if field.type is bool:
                parser.add_argument(option, dest=_key(name), action="store_true", help=text)
            else:
                parser.add_argument(option, f"--no-{option[2:]}", dest=_key(name), action=_Switch, help=text)
            continue
        metavar = about.metavar or ("S" if about.unit == "s" else "N" if _is_number(field.type) else option[2:].upper())
        action = "append" if repeatable(field.type) else "store"
        parser.add_argument(option, dest=_key(name), action=action, metavar=metavar, help=text)


def _with_flags(text: str) -> str:
    """Return a help text with field names replaced by command-line options: "--compat diffusers" for
    "compat=diffusers"."""
    for kind in KINDS:
        for name, (_, about) in arguments(kind).items():
            if option := flag(name, about):
                text = re.sub(rf"\b{name}=(\w+)", rf"{option} \1", text)
                text = re.sub(rf"\b{name}\b", option, text) if "_" in name else text
    return text


def read_fields(options: Any, kind: type) -> dict[str, Any]:
    """Return the values of the given fields, converted from text.

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
    """Return the error with command-line options instead of the field names at the start of its message."""
    flags = {name: flag(name, about) for kind in kinds for name, (_, about) in arguments(kind).items()}
    subject, colon, rest = str(error).partition(":")
    names = subject.split(", ")
    if colon and all(flags.get(name) for name in names):
        return InputError(f"{', '.join(flags[name] for name in names)}:{rest}")
    return error


def text_or_file(text: str) -> str:
    """Return the text, or the contents of the file named after @."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig").rstrip("\r\n")  # the line end is the file's
    except UnicodeDecodeError as error:
        raise InputError(f"{text[1:]}: not UTF-8 text ({error}); save it as UTF-8") from None


def _key(name: str) -> str:
    """Return the parser's key for a field. It is not the field's name, which may be the option of another field."""
    return name if name == "prompt" else f"field_{name}"


def _is_number(kind: Any) -> bool:
    return bool(value_types(kind) & {int, float}) and str not in value_types(kind)


def _only_lists(kind: Any) -> bool:
    return all(part is types.NoneType or typing.get_origin(part) for part in alternatives(kind))


def _convert(value: Any, kind: Any, option: str) -> Any:
    if isinstance(value, str) and value_types(kind) == {bool}:
        if value.lower() not in ("true", "false"):
            raise InputError(f"{option}: expected true or false, found {value!r}")
        return value.lower() == "true"
    if not isinstance(value, str) or not _is_number(kind):
        return value
    whole = float not in value_types(kind)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise InputError(f"{option}: expected a {'whole ' if whole else ''}number, found {value!r}") from None
