"""A YAML document of plain values: all that a config needs, and nothing that could harm its reader.

Besides the objects that PyYAML's safe loader refuses there are no aliases (nine lines of them can expand to a billion
values), tags, dates or duplicate keys, no number beyond 64 bits, and limits on size and depth.
"""

import re
from typing import Any, ClassVar, NoReturn

import yaml

LARGEST = 100_000  # bytes; configs have about a thousand
DEEPEST = 20
KINDS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


# As in YAML 1.2, and inf as in Python. In PyYAML 1e-3 is text too, and yes, no, on and off are no texts: `on:` is a
# field of a policy.
NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*[eE][-+]?[0-9]+|inf)\Z")
TRUTH = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
BOOL = "tag:yaml.org,2002:bool"


class DocumentError(Exception):
    """The text is no such document; the message says where."""


def refuse(what: str, mark: Any) -> NoReturn:
    raise DocumentError(f"line {mark.line + 1}: {what}")


def parse(text: str | bytes) -> Any:
    """The values of a YAML text; bytes are UTF-8.

    Raises:
        DocumentError: it is not YAML, is too large, or uses what is not accepted here.
    """
    if len(text) > LARGEST:
        raise DocumentError(f"has more than the {LARGEST:,} bytes that are read")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        # a safe loader that knows less
        return yaml.load(text, PlainLoader)  # nosec B506
    except UnicodeDecodeError as error:
        raise DocumentError(f"not YAML: byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise DocumentError(f"not YAML: {where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise DocumentError(f"not YAML: {error}") from error


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader for a part of YAML."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        kind: yaml.SafeLoader.yaml_constructors[kind] for kind in KINDS
    }
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [(kind, pattern) for kind, pattern in resolvers if kind in KINDS and kind != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            refuse(f"aliases such as *{event.anchor} are not read: write the value out", event.start_mark)
        if event.tag is not None:
            refuse(f"tags such as {event.tag} are not read", event.start_mark)
        if self.depth > DEEPEST:
            refuse(f"more than {DEEPEST} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in given:
                    refuse(f"{key.value} is given twice", key.start_mark)
                given.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            refuse("half a character (a surrogate)", node.start_mark)
        except ValueError:
            refuse(f"no number: {node.value!r}", node.start_mark)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            refuse("a number beyond 64 bits", node.start_mark)
        if isinstance(value, str) and "\0" in value:
            refuse("a NUL character", node.start_mark)
        return value


class PlainDumper(yaml.SafeDumper):
    """Writes what `parse` reads back as it was: a text that looks like a number to it is quoted."""


for _side in (PlainLoader, PlainDumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789i"))
PlainLoader.add_implicit_resolver(BOOL, TRUTH, list("tTfF"))
