"""Kinds of adapters that PEFT doesn't have."""

from __future__ import annotations

from peft import PeftType


def new_peft_type(name: str) -> PeftType:
    """PEFT's types are a closed enum, which its registry looks up by name: adds a member to it."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return member
