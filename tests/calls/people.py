"""Pydantic models for schemas by path."""

from __future__ import annotations

import enum
from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel, field_validator


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Address(BaseModel):
    street: str
    number: int | None = None


class Person(BaseModel):
    name: str
    age: Annotated[int, Field(ge=0)]
    height: float | None = None
    mood: Mood = Mood.GOOD
    kind: Literal["a", "b"] = "a"
    born: date | None = None
    home: Address | None = None

    @field_validator("name")
    @classmethod
    def _not_nobody(cls, value: str) -> str:
        if value == "Nobody":
            raise ValueError("there is no Nobody")
        if value == "Bug":
            raise ZeroDivisionError("a bug of the model's own")
        return value.strip()


class People(RootModel[list[Person]]):
    pass


class Open(BaseModel, extra="allow"):
    a: int


class Aliased(BaseModel):
    inner: int = Field(alias="outer")


PERSON = "tests.calls.people.Person"


PERSON_COLUMNS = {
    "name": "str",
    "age": "int",
    "height": "float",
    "mood": "str",
    "kind": "str",
    "born": "str",
    "home": "json",
}


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    ok: bool
