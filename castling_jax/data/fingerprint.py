"""A fingerprint of the data that a run learns from, by which a change between a start and a later one is noticed.

It is of names, counts, the order of the classes, and versions. Images are not read for it: a file that is replaced by
another of its name is not noticed.
"""

from typing import Any

from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError

Fingerprint = dict[str, Any]
NAMED = 3  # classes in an error message


def fingerprint(train_set: Dataset, eval_set: Dataset, test_set: Dataset | None = None) -> Fingerprint:
    """What is kept of the data: {"classes": names, "training": {"images": count, ...}, "held-out": likewise}.

    With a test set there is "test" too.
    """
    splits = {"training": train_set, "held-out": eval_set} | ({} if test_set is None else {"test": test_set})
    return {
        "classes": list(train_set.classes),
        **{name: {"images": len(split), **split.contents()} for name, split in splits.items()},
    }


def compare_data(before: Fingerprint, now: Fingerprint, *, accept_changes: bool) -> str:
    """Refuses to go on with other data than a run began with.

    Args:
      before: the run's.
      now: of the data that is here.
      accept_changes: whether other images are taken; other classes never are, as labels would mean something else.

    Returns:
      What has changed and is accepted; "" where nothing has.

    Raises:
      InputError: something has changed; says what.
    """
    check_same_classes(before["classes"], now["classes"])
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
    """Refuses classes that are not a run's.

    Args:
      before: the run's.
      now: of the data that is here.
      remedy: what a person may do.

    Raises:
      InputError: names those that are missing or new, or says that their order is another.
    """
    if before != now:
        raise InputError(f"the data's classes are not the run's ({_class_changes(before, now)}): {remedy}.")


def _class_changes(before: list[str], now: list[str]) -> str:
    missing, new = ([name for name in these if name not in others] for these, others in ((before, now), (now, before)))
    said = [f"{len(now):,} instead of {len(before):,}"] if len(now) != len(before) else []
    said += [f"{_listed(names)} {word}" for names, word in ((missing, "missing"), (new, "new")) if names]
    return ", ".join(said) or "the order is another"


def _changes(what: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    said = []
    if before["images"] != now["images"]:
        said.append(f"{what} holds {now['images']:,} images instead of {before['images']:,}")
    for name in sorted((before.keys() | now.keys()) - {"images"}):
        old, new = before.get(name), now.get(name)
        if old != new and name == "version":
            said.append(f"{what} is of {new} instead of {old}")
        elif old != new and not said:  # other names go without saying where there are more or fewer
            said.append(f"{what} has other {name}")
    return said


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
