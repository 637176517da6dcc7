"""What the parts of written records share: frozen, 6 significant digits, valid Unicode, a description a field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)


def significant(value: float) -> float:
    """`value` to 6 significant digits, without a negative zero."""
    return float(f"{value:.6g}") + 0.0


def _text(value: Any) -> Any:
    """Text that is valid Unicode: undecodable bytes of a file name appear as `\\udcNN`."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Number = Annotated[float, Field(allow_inf_nan=False), AfterValidator(significant)]
#: From 0 to 1.
Score = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1), AfterValidator(significant)]
Text = Annotated[str, BeforeValidator(_text)]


def require_written(schema: dict[str, Any], model: type[Part]) -> None:
    """Every field is in what is written, but for those that may be left out."""
    schema["required"] = [name for name in schema["properties"] if name not in model.left_out]


class Part(BaseModel):
    """Frozen; unknown keys of a newer minor version are passed over when reading."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, json_schema_extra=require_written)
    #: Fields that are left out, not null, where they say nothing.
    left_out: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept: dict[str, Any] = handler(self)
        return {k: v for k, v in kept.items() if v is not None or k not in self.left_out}
