"""Reading the fields of a request: each is checked, and none is accepted and then ignored.

A field is read with its schema, the form of its values in JSON Schema. So what the server says of its requests
(`lepton.serve.openapi`) is what reads them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias, TypeVar

from lepton.errors import nearest, shown
from lepton.serve.limits import Refusal

Schema: TypeAlias = dict[str, Any]
"""What JSON may be, as JSON Schema of 2020-12 says it; an empty one allows anything."""
FINITE = math.nextafter(math.inf, 0)
"""The largest float."""


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal("the body's JSON is nested too deeply") from None
    except ValueError as error:
        raise Refusal(f"the body is no JSON in UTF-8 ({shown(str(error))})") from None
    if not isinstance(found, dict):
        raise Refusal(f"the body is {shown(found)}: give a JSON object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


Whole = TypeVar("Whole", int, None)
Real = TypeVar("Real", float, None)


class Fields:
    """The fields of a request that have not been read yet. null stands for a field that is left out."""

    def __init__(self, body: dict[str, Any], place: str = "") -> None:
        """`place` is the path of the object in the request, such as ``messages[0].``."""
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: dict[str, Schema] = {}
        self._place = place

    def take(self, name: str, default: Any = None, schema: Schema | None = None) -> Any:
        """Return a field's value as it is; `schema` is what it may be, None: anything."""
        self._known[name] = schema or {}
        return self._left.pop(name, default)

    def whole(self, name: str, default: Whole, low: int, high: int, note: str = "") -> int | Whole:
        """Return a whole number in `low`..`high`."""
        value = self.take(name, schema={"type": "integer", "minimum": low, "maximum": high})
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"must be a whole number in {low}..{high}{note}")
        return value

    def real(
        self,
        name: str,
        default: Real,
        low: float,
        high: float,
        *,
        above: bool = False,
        known: Iterable[float] | None = None,
    ) -> float | Real:
        """Return a finite number in `low`..`high`, with `above` one that is larger than `low`.

        `known` are the numbers that the caller takes, if they are not all: it refuses the others.
        """
        bounds = {"exclusiveMinimum" if above else "minimum": low} | ({"maximum": high} if high < FINITE else {})
        value = self.take(name, schema={"type": "number"} | bounds if known is None else {"enum": list(known)})
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low):
            self.refuse(name, value, f"must be a number {'above' if above else 'in'} {low:g}..{high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.take(name, default, {"type": "boolean"})
        if not isinstance(value, bool):
            self.refuse(name, value, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; lone surrogates, which JSON can smuggle in, become question marks."""
        value = self.take(name, default, {"type": "string"})
        if not isinstance(value, str):
            self.refuse(name, value, "must be a string")
        return clean(value)

    def inside(self, name: str, value: dict[str, Any]) -> "Fields":
        """Return the fields of an object in the field `name`."""
        return Fields(value, f"{self._place}{name}.")

    def refuse(self, name: str, value: object, text: str, code: str | None = None) -> NoReturn:
        """Refuse a value; `text` says what it must be."""
        given = "missing" if value is None else shown(value)
        raise Refusal(f"{self._place}{name}={given}: {text}", param=self._place + name, code=code)

    def allow(self, neutral: Mapping[str, Iterable[Any]]) -> None:
        """Read fields that cannot be honoured; refuse them unless their value asks for nothing."""
        for name, values in neutral.items():
            value = self.take(name, schema={"enum": [*values]})
            if value is not None and not any(type(value) is type(each) and value == each for each in values):
                self.refuse(name, value, "this server does not support it; leave it out", "unsupported_parameter")

    def finish(self) -> None:
        """Refuse fields that nobody has read."""
        for name in self._left:
            text = f"unknown field {shown(name)}{nearest(name, self._known)}"
            raise Refusal(self._place + text, param=self._place + name[:100], code="unknown_parameter")

    def schema(self, needed: Iterable[str] = ()) -> Schema:
        """Return what an object with the fields that were read may be; those but `needed` may be null or left out."""
        needed = [*needed]
        known = {name: each if name in needed else _or_null(each) for name, each in self._known.items()}
        return {"type": "object", "properties": known, "required": needed, "additionalProperties": False}


def schema_of(read: Callable[[Fields], object], sample: dict[str, Any]) -> Schema:
    """Return what `read` may be given: `sample` is an object that it takes, of the fields that it needs."""
    fields = Fields(sample)
    read(fields)
    return fields.schema(sample)


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]} if schema else {}


def clean(text: str) -> str:
    """Return a text that UTF-8 can encode."""
    return text.encode("utf-8", "replace").decode()
