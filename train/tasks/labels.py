"""Labels of records: names of classes, their numbers, and a split that keeps their shares."""

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from jlora.train.config import DataOptions, UserError
from jlora.train.models import hf, packaged


@dataclasses.dataclass(frozen=True)
class Label:
    """What a record says it is, as text, and where that stands: "train.tsv, line 7"."""

    text: str
    where: str


def read_label(value: Any, column: str, where: str) -> Label:
    """A label of a record: text, a whole number, or true and false."""
    if isinstance(value, bool):
        value = json.dumps(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"{where}: column {column!r} is {value!r}, wanted a class: text or a whole number (for other numbers "
            "there is --task regression)"
        )
    return Label(str(value).strip(), where)


def read_number(value: Any, column: str, where: str) -> float:
    """A number of a record."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(
            f"{where}: column {column!r} is {value!r}, wanted a number (for classes there is --task classification)"
        )
    return number


def number(text: str) -> int | None:
    """A label's number, None for one that is no whole number."""
    return int(text) if text.removeprefix("-").isdecimal() else None


def class_names(train: Sequence[Label], given: Sequence[str], checkpoint: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers.

    Those that are given (--labels); else those that the training data holds, by number or by alphabet. A checkpoint
    that has a head for just these, or for as many if they are numbers from 0 on, keeps its own names and order.
    """
    if given:
        if len(given) < 2 or len(set(given)) < len(given):
            raise ValueError(f"--labels wants two names or more, each once, got {' '.join(given)}")
        return tuple(given)
    found = Counter(label.text for label in train)
    first = {label.text: label.where for label in reversed(train)}
    numbers = {text: number(text) for text in found}
    if None not in numbers.values():
        names = sorted(found, key=lambda text: numbers[text])
        if numbers[names[0]] < 0:
            raise ValueError(
                f"{first[names[0]]}: label {names[0]} is outside the range: classes count from 0, and a negative "
                "number mostly marks a record without a label. Leave such records out, or name them with --labels"
            )
        if len(set(numbers.values())) < len(numbers):
            raise ValueError(f"labels that are one number written in two ways: {', '.join(names)}")
    else:
        names = sorted(found)
    if len(names) < 2:
        raise ValueError(f"every training record has the label {names[0]!r}: a classifier needs two classes or more")
    if len(names) > max(2, len(train) // 2) or (len(names) > 2 and all(map(_fraction, names))):
        some = ", ".join(names[:3])
        raise ValueError(
            f"the {len(train)} training records have {len(names)} different labels ({some}, ...), which do not look "
            "like classes: choose the column with --label-column, or --task regression for numbers"
        )
    if set(checkpoint) == set(names):
        return tuple(checkpoint)
    if len(checkpoint) == len(names) and [numbers[name] for name in names] == list(range(len(names))):
        return tuple(checkpoint)
    return tuple(names)


def _fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def number_classes(
    train: Sequence[Label], held_out: Sequence[Label], given: Sequence[str], checkpoint: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """The names of the classes, and the number of the class of every record: the place of its label among them.

    Labels that are numbers stand for themselves where no name is among them: 0 and 1 with --labels negative positive.
    """
    names = class_names(train, given, checkpoint)
    places = {name: i for i, name in enumerate(names)}
    if places.keys().isdisjoint(label.text for label in train):
        places = {str(i): i for i in range(len(names))}
    rest = "is none of the classes" if given else "is in the held-out data only, so that it cannot be learnt"
    return names, _numbers(train, places, names, "is none of the classes"), _numbers(held_out, places, names, rest)


def _numbers(labels: Sequence[Label], places: dict[str, int], names: Sequence[str], problem: str) -> np.ndarray:
    for label in labels:
        if label.text not in places:
            if number(label.text) is not None and all(number(place) is not None for place in places):
                low, high = (f(map(int, places)) for f in (min, max))
                problem = f"is outside the range {low} to {high}" if not low <= int(label.text) <= high else problem
            count = sum(other.text == label.text for other in labels)
            raise ValueError(
                f"{label.where}: label {label.text!r} ({count} of {len(labels)} records) {problem}; "
                f"the classes are {', '.join(names)}"
            )
    return np.array([places[label.text] for label in labels], np.int32)


def checkpoint_names(model: str) -> tuple[str, ...]:
    """Names of the classes that a checkpoint has a head for; none of one without."""
    found = packaged.find(model)
    directory = found[1] if found else pathlib.Path(model)
    if not (directory / "config.json").is_file():
        return ()
    source = hf.read_json(directory / "config.json")
    architecture = (source.get("architectures") or [""])[0]
    names = source.get("id2label") or {} if architecture.endswith("Classification") else {}
    return tuple(names.values())


def known(data: DataOptions, model: str) -> DataOptions:
    """The options with the names of the classes of the checkpoint, unless they have some."""
    names = data.labels or checkpoint_names(model)
    if not names:
        raise UserError(
            f"{model} has no classification head: evaluate a run with --run, or an adapter with --adapter and --labels"
        )
    return dataclasses.replace(data, labels=names)


def split(keys: Sequence[Hashable], labels: Sequence[Hashable], fraction: float, seed: int) -> tuple[list, list]:
    """Numbers of the records to train on, and of those to hold out: a share of each class, drawn from `seed`.

    Records of equal keys stay together, so that nothing held out was trained on. Of every class at least one key is
    trained on.
    """
    by_class: dict[Hashable, dict[Hashable, list[int]]] = {}
    class_of: dict[Hashable, Hashable] = {}
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        by_class.setdefault(class_of.setdefault(key, label), {}).setdefault(key, []).append(i)
    rng = np.random.default_rng(seed)
    held: set[int] = set()
    for groups in by_class.values():
        unique = list(groups)
        count = min(round(fraction * len(unique)), len(unique) - 1)
        held.update(i for place in rng.permutation(len(unique))[:count] for i in groups[unique[place]])
    if not held:
        raise ValueError(
            f"{len(keys)} records of {len(by_class)} classes are too few to hold out {fraction:.0%}: raise "
            "--eval-fraction, or give --eval-data"
        )
    return [i for i in range(len(keys)) if i not in held], sorted(held)
