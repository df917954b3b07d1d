"""How two descriptions of data differ, for messages."""

from collections.abc import Iterator, Mapping

MOST_DIFFERENCES = 10


def differences(first: Mapping[str, object], its_name: str, second: Mapping[str, object], other_name: str) -> str:
    """ "seed: 1 in <its_name>, 2 in <other_name>; ...": the first MOST_DIFFERENCES by name, "" where all is equal."""
    ours, theirs = dict(_leaves("", first)), dict(_leaves("", second))
    differing = [
        f"{name}: {_shortened(ours.get(name))} in {its_name}, {_shortened(theirs.get(name))} in {other_name}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(differing[:MOST_DIFFERENCES])


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings and lists, each with its path: ("sources.0.a.jsonl", "3f...")."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}.{index}", inner)
    else:
        yield name, value


def _shortened(value: object, most: int = 80) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
