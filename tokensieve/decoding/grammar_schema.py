"""Which JSON schemas can be kept to the letter while a model writes. Needs neither torch nor XGrammar.

XGrammar 0.2 drops what it cannot express, with a line on standard error at best: `not`, `uniqueItems`, `if`, names in
`required` without a property, lookaheads in patterns, keywords beside an `enum`. An answer would parse and still break
its schema. So a schema passes only if every keyword in it is one that is enforced where it stands, and annotations are
the only keywords that may be without effect. Limits keep a hostile schema from compiling for minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokensieve.errors import BadOption

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 2000  # schemas within the schema
MAX_ENTRIES = 256  # properties of one object, values of one enum, alternatives of one anyOf

_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment".split()
)
_SIZES = frozenset({"minItems", "maxItems", "minLength", "maxLength"})
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_BY_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"pattern", "minLength", "maxLength", "format"}),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": frozenset(),
    "null": frozenset(),
}
_FORMATS = frozenset("date date-time duration email hostname ipv4 ipv6 time uuid".split())
_DEFINITIONS = ("$defs", "definitions")
_PYTHON = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def read_schema(path: str | Path) -> dict | bool:
    """Reads and checks a JSON schema file, which is not trusted.

    Raises:
        BadOption: no readable file, above `MAX_SCHEMA_BYTES`, no JSON, or a schema that `check_schema` refuses.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SCHEMA_BYTES + 1)
    except OSError as error:
        raise BadOption(f"The schema {str(path)!r} cannot be read.", hint="Check the path.") from error
    if len(data) > MAX_SCHEMA_BYTES:
        raise BadOption(f"The schema {str(path)!r} is larger than {MAX_SCHEMA_BYTES} bytes.")
    try:
        schema = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadOption(f"{str(path)!r} holds no JSON.") from error
    check_schema(schema)
    return schema


def check_schema(schema: object) -> None:
    """Raises BadOption, naming the place, unless every keyword of the schema is enforced.

    Taken are `type` (one, or a list without further keywords), `enum`, `const`, `anyOf`, `$ref` to a definition of the
    same schema, and for objects `properties`, `required`, `additionalProperties`; for arrays `items`, `prefixItems`,
    `minItems`, `maxItems`; for strings `pattern`, or `minLength` and `maxLength`, or a `format` of those that XGrammar
    knows; for numbers `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`. `true` is any JSON.
    """
    if not isinstance(schema, dict | bool):
        raise BadOption(f"A schema is a JSON object or true, got {_kind(schema)}.")
    _Check(schema).run()


class _Check:
    """One walk over a schema. `where` is the place as a JSON pointer."""

    def __init__(self, root: dict | bool):
        self.root = root
        self.num_nodes = 0
        self.references: list[tuple[str, str]] = []

    def run(self) -> None:
        self.node(self.root, "#", 0)
        for where, target in self.references:
            self.follow(where, target)

    def node(self, schema: object, where: str, depth: int) -> None:
        self.num_nodes += 1
        if depth > MAX_DEPTH or self.num_nodes > MAX_NODES:
            raise BadOption(f"The schema is deeper than {MAX_DEPTH} levels or has more than {MAX_NODES} parts.")
        if schema is True:
            return
        if not isinstance(schema, dict):
            raise BadOption(f"{where}: expected a schema, got {_kind(schema)}; nothing fits false.")
        for name in _DEFINITIONS if depth == 0 else ():
            for key, value in self.mapping(schema.get(name, {}), f"{where}/{name}").items():
                self.node(value, f"{where}/{name}/{key}", depth + 1)
        rules = set(schema) - _ANNOTATIONS - (set(_DEFINITIONS) if depth == 0 else set())
        for name in ("$ref", "const", "enum", "anyOf"):
            if name in rules:
                return self.alone(name, schema, rules, where, depth)
        if not rules:
            return
        self.typed(schema, rules, where, depth)

    def alone(self, name: str, schema: dict, rules: set[str], where: str, depth: int) -> None:
        """A keyword beside which others have no effect, except a `type` that its values have anyway."""
        value = schema[name]
        self.only(rules, {name, "type"} if name in ("const", "enum") else {name}, where)
        if name == "$ref":
            if not isinstance(value, str) or not value.startswith("#/"):
                raise BadOption(f"{where}: $ref must lead to a definition of the same schema, such as '#/$defs/name'.")
            self.references.append((where, value))
        elif name == "anyOf":
            for number, part in enumerate(self.sequence(value, f"{where}/anyOf")):
                self.node(part, f"{where}/anyOf/{number}", depth + 1)
        else:
            values = self.sequence(value, f"{where}/enum") if name == "enum" else [value]
            wanted = schema.get("type")
            if wanted is not None and not all(_has_type(v, wanted) for v in values):
                raise BadOption(f"{where}: the values of {name} are not all of type {wanted!r}.")

    def typed(self, schema: dict, rules: set[str], where: str, depth: int) -> None:
        kind = schema.get("type")
        if isinstance(kind, list) and kind and all(isinstance(k, str) and k in _BY_TYPE for k in kind):
            return self.only(rules, {"type"}, where)
        if not isinstance(kind, str) or kind not in _BY_TYPE:
            raise BadOption(
                f"{where}: a schema with {', '.join(sorted(rules))} needs a type, one of {', '.join(_BY_TYPE)}."
            )
        self.only(rules, _BY_TYPE[kind] | {"type"}, where)
        for name in rules & (_SIZES | _BOUNDS):
            number = schema[name]
            whole = isinstance(number, int) or name in _BOUNDS and isinstance(number, float)
            if isinstance(number, bool) or not whole or (name in _SIZES and number < 0):
                raise BadOption(f"{where}/{name}: not an allowed number.")
        if kind == "object":
            self.object(schema, where, depth)
        elif kind == "array":
            self.array(schema, where, depth)
        elif kind == "string":
            self.string(schema, rules, where)

    def object(self, schema: dict, where: str, depth: int) -> None:
        properties = self.mapping(schema.get("properties", {}), f"{where}/properties")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
            raise BadOption(f"{where}/required: expected a list of names.")
        if missing := sorted(set(required) - set(properties)):
            raise BadOption(f"{where}: required names {missing[:3]} are not among the properties.")
        if "additionalProperties" in schema and schema["additionalProperties"] is not False:
            self.node(schema["additionalProperties"], f"{where}/additionalProperties", depth + 1)
        for key, value in properties.items():
            self.node(value, f"{where}/properties/{key}", depth + 1)

    def array(self, schema: dict, where: str, depth: int) -> None:
        if "items" not in schema and "prefixItems" not in schema:
            raise BadOption(f"{where}: an array needs items or prefixItems.")
        if schema.get("items", False) is not False:
            self.node(schema["items"], f"{where}/items", depth + 1)
        for number, part in enumerate(self.sequence(schema.get("prefixItems", [True]), f"{where}/prefixItems")):
            self.node(part, f"{where}/prefixItems/{number}", depth + 1)

    def string(self, schema: dict, rules: set[str], where: str) -> None:
        ways = [name for name in ("pattern", "format") if name in rules]
        if len(ways) > 1 or (ways and rules & _SIZES):
            raise BadOption(f"{where}: only one of pattern, format and a length is enforced.")
        if "format" in rules and schema["format"] not in _FORMATS:
            raise BadOption(f"{where}: format must be one of {', '.join(sorted(_FORMATS))}.")
        if "pattern" in rules and (not isinstance(schema["pattern"], str) or _looks_around(schema["pattern"])):
            raise BadOption(f"{where}: pattern must be a regular expression without lookaheads or lookbehinds.")

    def follow(self, where: str, target: str) -> None:
        """A reference must end at a schema; one that leads to itself, and to nothing else, has no sentence at all."""
        seen = set()
        while True:
            if target in seen:
                raise BadOption(f"{where}: $ref leads in a circle.")
            seen.add(target)
            parts = target.split("/")
            if len(parts) != 3 or parts[1] not in _DEFINITIONS or not isinstance(self.root, dict):
                raise BadOption(f"{where}: $ref must be '#/$defs/name' or '#/definitions/name'.")
            found = self.root.get(parts[1], {}).get(parts[2])
            if found is None:
                raise BadOption(f"{where}: $ref leads to no definition.")
            if not isinstance(found, dict) or "$ref" not in found:
                return
            target = found["$ref"]

    @staticmethod
    def only(rules: set[str], allowed: set[str] | frozenset[str], where: str) -> None:
        if others := sorted(rules - allowed):
            raise BadOption(
                f"{where}: {', '.join(map(repr, others[:3]))} would have no effect here.",
                hint=f"Enforced here: {', '.join(sorted(allowed))}.",
            )

    @staticmethod
    def mapping(value: object, where: str) -> Mapping[str, object]:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            raise BadOption(f"{where}: expected an object of at most {MAX_ENTRIES} schemas.")
        return value

    @staticmethod
    def sequence(value: object, where: str) -> list:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_ENTRIES:
            raise BadOption(f"{where}: expected a list of 1 to {MAX_ENTRIES} values.")
        return value


def _looks_around(pattern: str) -> bool:
    return any(mark in pattern for mark in ("(?=", "(?!", "(?<"))


def _has_type(value: object, wanted: object) -> bool:
    kinds = wanted if isinstance(wanted, list) else [wanted]
    for kind in kinds:
        if kind == "null" and value is None:
            return True
        if isinstance(kind, str) and isinstance(value, _PYTHON.get(kind, ())):
            return isinstance(value, bool) == (kind == "boolean")
    return False


def _kind(value: object) -> str:
    return type(value).__name__
