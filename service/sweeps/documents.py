"""From bytes to a checked spec: JSON or YAML, with errors that name field, value and what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from typing import Any, Final, NoReturn, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ddpnopt.config import LoneBaseline, PairedBaseline
from service.errors import FieldError, InvalidInputError
from service.sweeps.spec import SweepSpec

SHOWN: Final = 80
TOLD: Final = 20
"""Errors that an answer names one by one."""
MISSING: Final = frozenset({"missing", "union_tag_not_found"})
NO_MAPPING: Final = frozenset({"model_type", "model_attributes_type"})
UNTAGGED: Final = frozenset({"union_tag_invalid", "union_tag_not_found"})


class _Loader(yaml.SafeLoader):
    """YAML without tags, aliases or duplicate keys, and with `5e-5` a number as in YAML 1.2."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, "an alias", "plain YAML without anchors and aliases")
        tag: str | None = getattr(event, "tag", None)
        if tag is not None:
            self.refuse(event, f"the tag {tag}", "plain YAML without tags")
        return super().compose_node(parent, index)

    def refuse(self, event: Any, value: str, allowed: str) -> NoReturn:
        where = f"line {event.start_mark.line + 1}" if event.start_mark else "document"
        raise InvalidInputError([FieldError(where, value, allowed)])

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if (twice := _first_twice(key.value for key, _ in node.value)) is not None:
            self.refuse(node, f"the key {twice!r} twice", "each key once")
        return super().construct_mapping(node, deep)


# As in YAML 1.2: no dates, and neither octal 010 nor sexagesimal 1:30 among the numbers.
_TAG: Final = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag[len(_TAG) :] not in ("timestamp", "int", "float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"""^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$
        |^[-+]?[0-9]+[eE][-+]?[0-9]+$
        |^[-+]?\.(inf|Inf|INF)$
        |^\.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)


def _invalid(field: str, value: object, allowed: str) -> InvalidInputError:
    return InvalidInputError([FieldError(field, shown(value), allowed)])


def shown(value: object) -> str:
    """Shorten a value for a message, as JSON would write it."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def parse_yaml(text: bytes) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InvalidInputError: if it is not plain YAML or not a mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}" if mark else "document"
        raise _invalid(where, problem or _one_line(error), "a YAML mapping") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise _invalid("document", _one_line(error), "a YAML mapping in UTF-8") from error
    return _mapping(document)


def parse_json(text: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidInputError: if it is not JSON or not an object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := _first_twice(key for key, _ in pairs)) is not None:
            raise _invalid("document", f"the key {twice!r} twice", "each key once")
        return dict(pairs)

    try:
        # NaN and Infinity pass here, so that the check of the spec can name their fields.
        document = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _invalid("document", _one_line(error), "a JSON object in UTF-8") from error
    return _mapping(document)


def _first_twice(keys: Iterable[object]) -> object | None:
    """Return the first key that was there before, if any."""
    seen: set[Hashable] = set()
    for key in keys:
        if isinstance(key, Hashable):
            if key in seen:
                return key
            seen.add(key)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _mapping(document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise _invalid("document", document, "a mapping with the keys of a spec")
    return document


def parse_spec(document: dict[str, Any]) -> SweepSpec:
    """Check a spec.

    Raises:
        InvalidInputError: naming every field that is wrong.
    """
    try:
        return SweepSpec.model_validate(document)
    except ValidationError as error:
        raise InvalidInputError(_field_errors(error)) from error


def _field_errors(error: ValidationError) -> list[FieldError]:
    found: dict[str, FieldError] = {}
    for item in error.errors(include_url=False, include_context=True):
        context = _context(item)
        path = _path((*_untagged(item["loc"]), *context.get("at", ())))
        allowed = _allowed(item["type"], item["msg"], context, item["loc"])
        value = "nothing" if item["type"] in MISSING else shown(context.get("given", item["input"]))
        if path in found:  # the branches of a union: say both
            allowed = f"{found[path].allowed}, or {allowed}"
        found[path] = FieldError(_short(path) or "document", value, allowed)
    told = list(found.values())[:TOLD]
    if len(found) > TOLD:
        told.append(FieldError("document", f"{len(found) - TOLD} more errors", "see the errors before"))
    return told


# Pydantic names the branch of a union in the path; a user has no use for it.
_BRANCH: Final = re.compile(r"^(constrained-)?(int|list|float|str|bool)(\[|$)|^function-")


def _context(item: Any) -> dict[str, Any]:
    """Return what an error tells of itself; a grid whose baseline is no grid's names that field."""
    context: dict[str, Any] = item.get("ctx", {})
    if item["type"] in UNTAGGED:
        context = context | {"at": ("baseline",), "given": item["input"].get("baseline")}
    return context


def _untagged(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Drop the baseline that pydantic puts behind a grid's position."""
    inside_a_grid = len(location) > 2 and location[0] == "grids" and isinstance(location[1], int)
    return (*location[:2], *location[3:]) if inside_a_grid else location


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not _BRANCH.match(step):
            path += f".{step}" if path else step
    return path


def _allowed(kind: str, message: str, context: dict[str, Any], location: tuple[int | str, ...]) -> str:
    if kind == "extra_forbidden":
        return _keys_at(location)
    if kind == "union_tag_invalid":
        paired, lone = (", ".join(get_args(names)) for names in (PairedBaseline, LoneBaseline))
        return f"one of {paired}, the baselines that have a DDPNOpt partner, or of {lone}, which have none"
    if kind in MISSING:
        return "it is required"
    if kind in NO_MAPPING:
        return "a mapping"
    if kind == "finite_number":
        return "a finite number"
    if kind == "too_short":
        return f"at least {context['min_length']} value"
    if kind == "too_long":
        return f"at most {context['max_length']} values, not {context['actual_length']}"
    return message.removeprefix("Input should be ").removeprefix("Input should ")


def _keys_at(location: tuple[int | str, ...]) -> str:
    model = _model_at(location)
    if model is None:
        return "known keys only"
    keys = ", ".join(model.model_fields)
    # Which options there are hangs on the grid's baseline, which pydantic puts behind its position.
    return (
        f"one of the options of {location[2]}: {keys}" if "options" in location else f"one of the keys {keys}"
    )


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Find the model in which an unknown key was met."""
    found: list[type[BaseModel]] = [SweepSpec]
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        if len(found) > 1:  # a grid: the step is its baseline
            found = [model for model in found if step in get_args(model.model_fields["baseline"].annotation)]
        else:
            found = _models_in(found[0].model_fields[step].annotation)
    return found[0] if len(found) == 1 else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
