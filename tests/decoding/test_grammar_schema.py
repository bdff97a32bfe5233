"""A schema passes only if all of it is enforced, and no schema may keep the compiler busy."""

from __future__ import annotations

import json
import time

import pytest

from tests.pipeline.tiny_processors import make_tokenizer
from tokensieve.decoding.grammar_schema import MAX_DEPTH, MAX_ENTRIES, MAX_SCHEMA_BYTES, check_schema, read_schema
from tokensieve.errors import BadOption

# A schema, JSON that fits it, JSON that does not
ENFORCED = [
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, {"a": None}, {}),
    ({"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}, {"x": 1}, {"x": "1"}),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, [1, 2], [1]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [1, "a"],
        [1, "a", 2],
    ),
    ({"type": "string", "pattern": "^a+$"}, "aa", "ab"),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "aa", "a"),
    *(
        ({"type": "string", "format": name}, good, "x y")
        for name, good in {
            "date": "2026-11-26",
            "date-time": "2026-11-26T04:00:00Z",
            "duration": "P1D",
            "email": "a@b.cd",
            "hostname": "b.cd",
            "ipv4": "1.2.3.4",
            "ipv6": "1:2:3:4:5:6:7:8",
            "time": "04:00:00Z",
            "uuid": "00000000-0000-0000-0000-000000000000",
        }.items()
    ),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 9}, 8, 9),
    ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 9}, 0.75, 0.25),
    ({"type": "boolean"}, True, 1),
    ({"type": ["integer", "null"]}, None, "a"),
    ({"type": "string", "enum": ["a", "b"]}, "b", "c"),
    ({"const": 3}, 3, 4),
    ({"anyOf": [{"type": "integer"}, {"const": "a"}]}, "a", "b"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, 1, "1"),
    ({"definitions": {"x": {"$ref": "#/definitions/y"}, "y": {"const": 1}}, "$ref": "#/definitions/x"}, 1, 2),
    ({"title": "t", "description": "d", "type": "integer", "examples": ["x"]}, 1, "x"),
]
REFUSED = [
    ([], "object or true"),
    (False, "nothing fits false"),
    ({"not": {"type": "integer"}}, "needs a type"),
    ({"type": "integer", "not": {"const": 3}}, "'not' would have no effect"),
    ({"type": "integer", "multipleOf": 3}, "'multipleOf' would"),
    ({"type": "array", "items": True, "uniqueItems": True}, "'uniqueItems' would"),
    ({"type": "array", "minItems": 2}, "needs items"),
    ({"type": "array", "items": True, "minItems": -1}, "not an allowed number"),
    ({"type": "array", "items": True, "minItems": True}, "not an allowed number"),
    ({"type": "string", "minLength": 1.5}, "not an allowed number"),
    ({"type": "string", "pattern": "a", "minLength": 3}, "only one of"),
    ({"type": "string", "pattern": "(?=a)b"}, "without lookaheads"),
    ({"type": "string", "format": "colour"}, "format must be"),
    ({"type": "object", "required": ["a"]}, r"\['a'\] are not among"),
    ({"type": "object", "properties": {"a": {"type": "banana"}}}, "#/properties/a: a schema with type"),
    ({"type": "object", "properties": {"a": False}}, "nothing fits false"),
    ({"type": "object", "patternProperties": {}}, "'patternProperties' would"),
    ({"type": "integer", "if": {}, "then": {}}, "'if', 'then' would"),
    ({"minimum": 3}, "needs a type"),
    ({"oneOf": [{"type": "integer"}]}, "needs a type"),
    ({"type": "object", "anyOf": [{"required": ["a"]}]}, "'type' would"),
    ({"type": ["integer", "null"], "minimum": 3}, "'minimum' would"),
    ({"type": "integer", "enum": [1, "a"]}, "not all of type"),
    ({"type": "integer", "const": True}, "not all of type"),
    ({"enum": []}, "list of 1 to"),
    ({"enum": list(range(MAX_ENTRIES + 1))}, "list of 1 to"),
    ({"type": "object", "properties": {str(i): True for i in range(MAX_ENTRIES + 1)}}, "at most"),
    ({"$ref": "http://example.com/x.json"}, "same schema"),
    ({"$ref": "#/$defs/x"}, "no definition"),
    ({"$ref": "#"}, "same schema"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "circle"),
    ({"type": "integer", "$defs": {"a": {"not": {}}}}, "needs a type"),
]


def nested(depth: int) -> dict:
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(("schema", "good", "bad"), ENFORCED)
def test_what_passes_is_enforced(schema, good, bad):
    xgrammar = pytest.importorskip("xgrammar")
    check_schema(schema)
    grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    accepts = xgrammar.testing._is_grammar_accept_string
    assert accepts(grammar, json.dumps(good)) and not accepts(grammar, json.dumps(bad))


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_would_be_ignored_is_refused(schema, message):
    with pytest.raises(BadOption, match=message):
        check_schema(schema)


def test_limits():
    check_schema(nested(MAX_DEPTH))
    with pytest.raises(BadOption, match="deeper than"):
        check_schema(nested(MAX_DEPTH + 1))
    wide = {"type": "array", "prefixItems": [nested(20)] * 200}
    with pytest.raises(BadOption, match="deeper than"):
        check_schema(wide)


@pytest.mark.parametrize(
    "schema",
    [
        nested(MAX_DEPTH),
        {"enum": [f"v{i}" for i in range(MAX_ENTRIES)]},
        {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(MAX_ENTRIES)}},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 2 * 10**6},
        {"type": "string", "pattern": "^((((a{1,50}){1,50}){1,50}){1,50})$"},
    ],
)
def test_the_worst_that_passes_compiles_soon(schema):
    pytest.importorskip("xgrammar")
    from tokensieve.decoding.grammar import json_schema

    begun = time.process_time()
    json_schema(make_tokenizer("llava"), schema)
    assert time.process_time() - begun < 5  # seconds; the same without limits ran for minutes


def test_files_are_not_trusted(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "integer"}')
    assert read_schema(path) == {"type": "integer"}
    for content, message in [
        (b'{"a": 1' + b" " * MAX_SCHEMA_BYTES, "larger than"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 60_000, "no JSON"),
        (b'{"type": "banana"}', "needs a type"),
    ]:
        path.write_bytes(content)
        with pytest.raises(BadOption, match=message):
            read_schema(path)
    with pytest.raises(BadOption, match="cannot be read"):
        read_schema(tmp_path / "none.json")
    with pytest.raises(BadOption, match="cannot be read"):
        read_schema(tmp_path)
