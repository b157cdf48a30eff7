"""Checks of fields that several classes have. Each raises a ValueError that begins with the name of the field."""

import difflib
import inspect

import torch


def check_choice(field, value, allowed):
    if value not in list(allowed):  # a list, so that values that are not hashable can be compared
        raise ValueError(f"{field}: got {value!r}; expected one of {', '.join(allowed)}")


def check_known(given, owner, others):
    """
    Args:
        given: names of fields.
        owner: the class whose fields they should be: arguments of its `__init__`.
        others: other known names.
    """
    for field in given:
        if not is_known(field, owner, others):
            similar = difflib.get_close_matches(field, _own_fields(owner), n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"{field}: {owner.__name__} has no such field{hint}")


def is_known(field, owner, others):
    """As in `check_known`; names that begin with an underscore are Transformers' own."""
    return field.startswith("_") or field in others or field in _own_fields(owner)


def _own_fields(owner):
    return list(inspect.signature(owner.__init__).parameters)


def check_no_label_is(name, labels, option):
    """Refuses a model with a label of this name, under which what `option` returns holds something else."""
    if name in labels:
        raise ValueError(
            f"{option}: the model has the label {name!r}, a name that the result needs for something else; expected "
            "another name for the label in the model's id2label"
        )


def checked_dtype(field, dtype):
    """The `torch.dtype` that `dtype` is, or names."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{field}: got {dtype!r}; expected a floating-point dtype of torch, such as 'float32'")
    return found
