"""A fingerprint of a run's data, to notice changes when the run is resumed.

It is made from names, counts, the order of the classes, and versions. Images are not read, so a file that is replaced
by another one with the same name goes unnoticed.
"""

from typing import Any

from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError

Fingerprint = dict[str, Any]
NAMED = 3  # classes that an error message names


def fingerprint(train_set: Dataset, eval_set: Dataset, test_set: Dataset | None = None) -> Fingerprint:
    """{"classes": names, "training": {"images": count, ...}, "held-out": {"images": count, ...}}, and "test" with a
    test set. Data with boxes also has "category_ids", the number of each class in the annotations; nothing compares it.
    """
    splits = {"training": train_set, "held-out": eval_set} | ({} if test_set is None else {"test": test_set})
    category_ids = getattr(train_set, "category_ids", None)
    return {
        "classes": list(train_set.classes),
        **({} if category_ids is None else {"category_ids": category_ids.tolist()}),
        **{name: {"images": len(split), **split.contents()} for name, split in splits.items()},
    }


def compare_data(before: Fingerprint, now: Fingerprint, *, accept_changes: bool) -> str:
    """Refuses to resume a run on data other than the data it began with.

    Args:
      before: the fingerprint that the run began with.
      now: the fingerprint of the data as it is now.
      accept_changes: whether other images are accepted. Other classes never are, because labels would change meaning.

    Returns:
      A text about the accepted changes; "" if nothing has changed.

    Raises:
      InputError: the data has changed; the message says how.
    """
    check_same_classes(before["classes"], now["classes"])
    # The test set is optional: only a split that both fingerprints have can have changed.
    changes = [
        change
        for split in ("training", "held-out", "test")
        if split in before and split in now
        for change in _changes(f"the {split} split", before[split], now[split])
    ]
    if changes and not accept_changes:
        raise InputError(
            f"the data has changed since the run began: {'; '.join(changes)}; put it back, or go on with it as it is "
            "now by --config.dataset.accept_changes."
        )
    return "; ".join(changes)


def check_same_classes(
    before: list[str], now: list[str], *, remedy: str = "put them back, or choose another --workdir"
) -> None:
    """Refuses classes that differ from a run's.

    Args:
      before: the run's classes.
      now: the classes of the data as it is now.
      remedy: what the user can do about it, for the message.

    Raises:
      InputError: names the missing and the new classes, or says that their order has changed.
    """
    if before != now:
        raise InputError(f"the data's classes are not the run's ({_class_changes(before, now)}): {remedy}.")


def _class_changes(before: list[str], now: list[str]) -> str:
    missing = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    changes = [f"{len(now):,} instead of {len(before):,}"] if len(now) != len(before) else []
    changes += [f"{_listed(names)} {word}" for names, word in ((missing, "missing"), (new, "new")) if names]
    return ", ".join(changes) or "their order has changed"


def _changes(what: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = []
    if before["images"] != now["images"]:
        changes.append(f"{what} holds {now['images']:,} images instead of {before['images']:,}")
    for name in sorted((before.keys() | now.keys()) - {"images"}):
        old, new = before.get(name), now.get(name)
        if old != new and name == "version":
            changes.append(f"{what} is {new} instead of {old}")
        elif old != new and not changes:  # with another number of files, other file names are no news
            changes.append(f"{what} has other {name}")
    return changes


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
