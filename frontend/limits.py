"""The sizes that a traced program holds for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.frontend.conditions import Condition
from moec.ir import ArgumentValueError, ArtifactError, CompileError


@dataclass(frozen=True)
class Limits:
    """`bounds`: symbol → (least, greatest or None) of a dimension; `conditions`: what else has to be true of
    dimensions, see `conditions.Condition`."""

    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.bounds or self.conditions)

    def check(self, binding: Mapping[str, int]) -> None:
        """Raise ArgumentValueError if dimensions are not of the sizes that the program holds for."""
        for symbol, (least, greatest) in self.bounds.items():
            n = binding.get(symbol)
            if n is not None and (n < least or (greatest is not None and n > greatest)):
                limits = [f"at least {least}"] if least > 0 else []
                limits += [] if greatest is None else [f"at most {greatest}"]
                raise ArgumentValueError(
                    f"dimension {symbol} is {n}; the program holds for {' and '.join(limits)}",
                    code="shape",
                    hint="trace again with example arguments of that size, if the model takes it",
                )
        for condition in map(Condition, self.conditions):
            if not condition.holds(binding):
                sizes = ", ".join(f"{s} = {binding[s]}" for s in sorted(condition.symbols))
                raise ArgumentValueError(
                    f"the program holds for sizes with {condition}, got {sizes}",
                    code="shape",
                    hint="trace again with example arguments of such sizes, if the model takes them",
                )

    def to_dict(self) -> dict[str, Any]:
        return {"bounds": {k: list(v) for k, v in self.bounds.items()}, "conditions": list(self.conditions)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Limits:
        """Raises ArtifactError naming the field that is missing or malformed."""
        field_name = "bounds"
        try:
            bounds = {str(k): (int(a), None if b is None else int(b)) for k, (a, b) in data["bounds"].items()}
            field_name = "conditions"
            conditions = data.get("conditions", [])  # folders of before have none
            if not isinstance(conditions, list) or not all(isinstance(c, str) for c in conditions):
                raise TypeError(f"expected a list of texts, got {conditions!r}")
            for text in conditions:
                _ = Condition(text).symbols
        except (CompileError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise ArtifactError(f"field {field_name!r} is missing or malformed ({e})", code="load") from None
        return Limits(bounds, tuple(conditions))
