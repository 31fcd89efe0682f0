"""What all commands share: a parser that speaks in one line, and the `--json` form of figures."""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from lepton.errors import InputError, nearest


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are `InputError`, with the nearest match for unknown names.

    Flags are declared with underscores (``--model_size``) and accept dashes too (``--model-size``).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse `args`; unlike the base class, what is left over is an error (subcommands pass here too)."""
        assert args is not None, "the caller passes the arguments: only cli/main.py reads sys.argv"
        parsed, rest = super().parse_known_args(self._known(args), namespace)
        for word in rest:
            if word.startswith("-"):
                self._raise_unknown(word)
            raise InputError(f"unexpected argument '{word}'; see --help")
        return parsed, []

    def _known(self, args: Sequence[str]) -> list[str]:
        """Return `args` up to a bare ``--`` with ``--model-size`` as ``--model_size``, and texts joined to their flags.

        An unknown flag raises: the base class would first complain about flags that are missing, although one is only
        misspelled. It would also take a text that begins with a dash for a flag, but not in ``--prompt=---``.
        """
        words: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(_underscored(name))
            if word == "--":
                return [*words, word, *rest]
            elif not name.startswith("--") or " " in name:
                pass  # no flag: a name, or a text
            elif action is not None:
                word = _underscored(name) + equals + value
                if not equals and _takes_text(action) and rest and not self._is_flag(rest[0]):
                    word = f"{word}={rest.pop(0)}"
            elif self._subparsers is None:  # else it may be a flag of the subcommand
                self._raise_unknown(word)
            words.append(word)
        return words

    def _is_flag(self, word: str) -> bool:
        return _underscored(word) in self._option_string_actions

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Return a flag's value; the base class of Python 3.11 and 3.12 drops one that is ``--``."""
        if action.option_strings and arg_strings == ["--"] and _takes_text(action):
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _raise_unknown(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        raise InputError(f"unknown flag '{name}'{nearest(name.replace('-', '_').replace('__', '--', 1), flags)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"unknown value '{value}'{nearest(str(value), choices)}")


def _underscored(word: str) -> str:
    return "--" + word[2:].replace("-", "_") if word.startswith("--") else word


def _takes_text(action: argparse.Action) -> bool:
    """Whether the flag is followed by one text, which may begin with a dash."""
    return action.nargs is None and action.type in (None, str)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: stdout is then JSON alone; progress and notes go to stderr."""
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout; notes go to stderr")


def print_json(figures: object) -> None:
    """Print `figures` as one line of ASCII JSON, which every console can show."""
    print(json.dumps(figures), flush=True)
