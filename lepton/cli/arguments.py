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
        """Return `args` with ``--model-size`` written ``--model_size`` up to a bare ``--``; an unknown flag raises.

        The base class would first complain about flags that are missing, although one is only misspelled.
        """
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            flag = "--" + name[2:].replace("-", "_")
            if not name.startswith("--") or " " in name:
                continue  # no flag: a name, or a text that is a flag's value
            if flag in self._option_string_actions:
                words[i] = flag + equals + value
            elif self._subparsers is None:  # else it may be a flag of the subcommand
                self._raise_unknown(word)
        return words

    def _raise_unknown(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        raise InputError(f"unknown flag '{name}'{nearest(name.replace('-', '_').replace('__', '--', 1), flags)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"unknown value '{value}'{nearest(str(value), choices)}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: stdout is then JSON alone; progress and notes go to stderr."""
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout; notes go to stderr")


def print_json(figures: object) -> None:
    """Print `figures` as one line of ASCII JSON, which every console can show."""
    print(json.dumps(figures), flush=True)
