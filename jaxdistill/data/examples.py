# SPDX-License-Identifier: Apache-2.0
"""What examples must be, checked once where they enter, and the error that says so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MASKS = ("labelled", "token_mask", "attention_mask")
"""Entries that say what counts: truth values, 0 and 1."""
OWN: dict[str, Callable[[int], Any]] = {"mask": np.ones, "index": np.arange}
"""Entries that `Batches` makes for each batch, and what they are of all examples."""


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for; one sentence says so."""


def check_examples(
    examples: Any,
    *,
    logits: Sequence[int] | None = None,
    check_finite: bool = True,
    whole: bool = True,
) -> int:
    """How many examples there are; raises DataError unless a step can use them all.

    Every way in asks this: `train.fit`, `study.Study`, `train.Evaluator`, sweeps and
    stores. An index beyond a shorter entry's end would take another example's.

    Args:
      examples: `inputs`, and what else a batch has (`types.Batch`), arrays `[N, ...]`
        or mappings of them. Without `labels` nothing is said of labels.
      logits: the shape `[..., C]` of one example's logits, to which its labels and a
        teacher's stored outputs must fit; None where that is not known.
      check_finite: look for NaN and infinities in inputs and stored outputs, in one
        pass over them.
      whole: these are all there are: at least one label must count.

    Raises:
      DataError: entries of unlike length, or of none; values that are no numbers, or
        not finite; masks other than 0 and 1, or under which nothing counts; a text that
        is all padding; labels of another shape or range than the classes'; stored
        outputs of other shapes; entries that a batch makes itself.
    """
    if not isinstance(examples, Mapping) or "inputs" not in examples:
        found = type(examples).__name__
        if isinstance(examples, Mapping):
            found = f"a mapping of {', '.join(map(str, examples)) or 'nothing'}"
        raise DataError(
            "examples are a mapping of arrays, {'inputs': ..., 'labels': ...}, got "
            f"{found}"
        )
    leaves = dict(_leaves(examples))
    size = _check_lengths(leaves)
    for name, usual in OWN.items():
        # A batch made by hand has both; where they say nothing they do no harm.
        if name in examples and not np.array_equal(examples[name], usual(size)):
            raise DataError(
                f"examples have an entry {name!r}, which each batch makes itself; to "
                "leave out labels or tokens use 'labelled' or 'token_mask', to leave "
                "out examples take them away"
            )
    for name, array in leaves.items():
        if name.split(".")[-1] in MASKS:
            _check_truth(name, array)
    if "labelled" in examples and examples["labelled"].ndim != 1:
        raise DataError(
            f"labelled has shape {examples['labelled'].shape}, and needs one value for "
            "each example"
        )
    check_inputs(examples["inputs"])
    if "labels" in examples:
        _check_labels(examples, logits)
    if whole:
        _check_counted(examples)
    if isinstance(outputs := examples.get("teacher"), Mapping):
        _check_outputs(outputs, logits)
    if check_finite:
        for name, array in leaves.items():
            if name.split(".")[0] in ("inputs", "teacher"):
                _check_finite(name, array)
    return size


def some_of(examples: Any, rows: np.ndarray) -> Any:
    """The examples at some rows, of an array or of a mapping of such.

    >>> some_of({"inputs": {"ids": np.arange(4)}}, np.array([3, 0]))
    {'inputs': {'ids': array([3, 0])}}
    """
    if isinstance(examples, Mapping):
        some = {name: some_of(part, rows) for name, part in examples.items()}
        # Stored outputs are a mapping that knows of which view they are.
        return examples.like(some) if hasattr(examples, "like") else some
    return np.asarray(examples)[rows]


def check_inputs(inputs: Any) -> None:
    """Raise DataError where a text is all padding; what has no mask is not looked at.

    Attention without any token to look at is uniform over the padding, and a mean of
    no tokens is no text's: a model would learn from what is not there.

    Args:
      inputs: an array, or a mapping that may have `attention_mask` `[N, L]`.
    """
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        return
    empty = np.flatnonzero(~np.asarray(inputs["attention_mask"]).any(axis=-1))
    if len(empty):
        raise DataError(
            f"row {empty[0]} is all padding: its attention_mask has no 1, and a text "
            "needs a token at least"
        )


def check_labels(
    labels: np.ndarray, num_classes: int, counted: np.ndarray | None = None
) -> None:
    """Raise DataError unless every label is an integer in `[0, num_classes)`.

    Args:
      labels: of any shape.
      num_classes: C.
      counted: of that shape, where a label counts; elsewhere it may be anything, such
        as -100. None is everywhere.
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers, got {labels.dtype}")
    outside = (labels < 0) | (labels >= num_classes)
    wrong = np.flatnonzero(outside if counted is None else outside & counted)
    if len(wrong):
        raise DataError(
            f"label {labels.flat[wrong[0]]} at position {wrong[0]} is out of range: "
            f"with {num_classes} classes, labels are 0 to {num_classes - 1}"
        )


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted name, array)` of all arrays in nested mappings."""
    if isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
        return
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype"):
        raise DataError(
            f"{name} is a {type(tree).__name__}, and must be an array: take np.asarray"
        )
    if np.dtype(tree.dtype).kind in "OUSMm" or tree.dtype == object:
        raise DataError(
            f"{name} holds no numbers but {tree.dtype}; texts are to be encoded first "
            "(pretrained.encode)"
        )
    yield name, tree


def _check_lengths(leaves: Mapping[str, Any]) -> int:
    """The one length of all arrays."""
    for name, array in leaves.items():
        if not array.shape:
            raise DataError(f"{name} is a single number; each example needs its own")
    first = next(iter(leaves))
    size = leaves[first].shape[0]
    for name, array in leaves.items():
        if array.shape[0] != size:
            raise DataError(
                f"{first} has {size:,} examples and {name} {array.shape[0]:,}: all "
                "entries need as many, in the same order"
            )
    if not size:
        raise DataError("the data set is empty")
    return size


def _check_truth(name: str, mask: Any) -> None:
    mask = np.asarray(mask)
    wrong = np.flatnonzero((mask != 0) & (mask != 1))
    if len(wrong):
        raise DataError(
            f"{name} says what counts, 0 or 1, and holds {mask.flat[wrong[0]]} in "
            f"example {np.unravel_index(wrong[0], mask.shape)[0]}: a mask is no weight"
        )


def _counted(examples: Mapping[str, Any]) -> np.ndarray:
    """Where a label counts, in the labels' shape."""
    shape = np.shape(examples["labels"])
    counted, inputs = np.ones(shape, bool), examples["inputs"]
    masks = [(examples, "labelled"), (examples, "token_mask")]
    if isinstance(inputs, Mapping):
        masks.append((inputs, "attention_mask"))
    for holder, name in masks:
        if name not in holder:
            continue
        mask = np.asarray(holder[name])
        # Of a whole example, or of a token; where labels are an example's a mask of
        # tokens says nothing of them.
        if mask.ndim > len(shape):
            continue
        if mask.shape != shape[: mask.ndim]:
            raise DataError(
                f"{name} has shape {mask.shape}, and labels {shape}: it needs one "
                "value for each example or each label"
            )
        counted &= (mask != 0).reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return counted


def _check_counted(examples: Mapping[str, Any]) -> None:
    """Raise DataError where masks leave out every token, or every label there is."""
    if "labels" in examples and not _counted(examples).any():
        raise DataError(
            "labelled and token_mask leave nothing to learn from: none counts"
        )


def _check_labels(examples: Mapping[str, Any], logits: Sequence[int] | None) -> None:
    labels = np.asarray(examples["labels"])
    if logits is None:
        return
    *leading, classes = logits
    expected = (labels.shape[0], *leading)
    if labels.shape != expected:
        raise DataError(
            f"labels have shape {labels.shape}, the model's logits "
            f"{(labels.shape[0], *logits)}: {_form(labels, expected, classes)}"
        )
    check_labels(labels, classes, _counted(examples))


def _form(labels: np.ndarray, expected: tuple[int, ...], classes: int) -> str:
    """What to do with labels of a wrong shape."""
    if labels.shape == (*expected, 1):
        return "take labels[..., 0]"
    if labels.shape == (*expected, classes):
        return "they look one-hot: take labels.argmax(-1)"
    if len(labels.shape) < len(expected) and labels.shape == expected[:1]:
        return "each of its positions needs a label, or the model a pooled output"
    return f"they must be integers of shape {expected}, and classes the last axis"


def _check_outputs(outputs: Mapping[str, Any], logits: Sequence[int] | None) -> None:
    """A teacher's stored outputs: their names, the axis of views, ids of classes."""
    top_k = {"ids", "log_probs", "logsumexp"}
    if "logits" not in outputs and not top_k <= set(outputs):
        raise DataError(
            "stored outputs have `logits`, or `ids`, `log_probs` and `logsumexp`, got "
            f"{', '.join(map(str, outputs)) or 'nothing'}"
        )
    name = "logits" if "logits" in outputs else "log_probs"
    found = np.shape(outputs[name])
    if len(found) < (3 if logits is None else len(logits) + 2):
        raise DataError(
            f"stored {name} have shape {found} and no axis of views, [N, views, ..., "
            "C]: of one view add it, logits[:, None]"
        )
    if logits is not None and found[2:-1] != tuple(logits[:-1]):
        raise DataError(
            f"stored {name} have shape {found}, [N, views, ..., C], and the model's "
            f"logits {(found[0], *logits)}: they are not of the same positions"
        )
    if "ids" in outputs:
        _check_ids(np.asarray(outputs["ids"]), None if logits is None else logits[-1])


def _check_ids(ids: np.ndarray, classes: int | None) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"ids of stored classes must be integers, got {ids.dtype}")
    lowest, highest = ids.min(), ids.max()
    if lowest < 0 or (classes is not None and highest >= classes):
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"a stored id is {wrong}, and classes count from 0"
            + ("" if classes is None else f" to {classes - 1}")
            + ": leave out what another tool filled up with, keep fewer classes"
        )


def _check_finite(name: str, array: Any) -> None:
    """Raise DataError at a NaN or an infinity; a stored logit may be -inf.

    Such a class is ruled out; a row must have one that is not.
    """
    array = np.asarray(array)
    # bfloat16 is of no kind that NumPy knows, and its sum is taken in float32.
    if array.dtype.kind in "iub":
        return
    # A sum is several times faster than a test of each, and finite only if all are.
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)):
            return
    array = array.reshape(len(array), -1)
    wrong = ~np.isfinite(array.astype(np.float32))
    said = "a NaN or an infinity"
    if name in ("teacher.logits", "teacher.log_probs"):
        wrong &= array != -np.inf
        wrong |= (array == -np.inf).all(1, keepdims=True)
        said = "a NaN, +inf, or only -inf"
    rows = np.flatnonzero(wrong.any(1))
    if len(rows):
        raise DataError(
            f"{name} of example {rows[0]} holds {said}: clean the data, or give "
            "check_finite=False where that is meant"
        )


def normalize(
    images: np.ndarray,
    mean: float | tuple[float, ...],
    deviation: float | tuple[float, ...],
    peak: int = 255,
) -> np.ndarray:
    """`(images / peak - mean) / deviation` as float32; one value, or one a channel.

    >>> normalize(np.array([0, 255], np.uint8), mean=0.5, deviation=0.5)
    array([-1.,  1.], dtype=float32)
    """
    # As many axes as the images have: JAX may be told to refuse to add some.
    lift = (1,) * (images.ndim - 1) + (-1,)
    centre, spread = (
        np.asarray(x, np.float32).reshape(lift) for x in (mean, deviation)
    )
    return (images / np.float32(peak) - centre) / spread
