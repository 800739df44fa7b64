"""Where queries are collected from: files, folders, data sets, and names for some of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from specdec.bench.sources import DATA_DIR_VARIABLE, require_data_dir
from specdec.data.named_sources import NAMED_SOURCES, NamedSource
from specdec.data.records import FileRecords, Malformed, Record
from specdec.hub import HUB, find_path

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


class Records(Protocol):
    """Records that can be counted, and told from others."""

    num_bytes: int
    done_bytes: int

    def identity(self) -> dict[str, Any]:
        """What changes when the records do."""

    def __iter__(self) -> Iterator[Record | Malformed]: ...


@dataclass(frozen=True)
class QuerySource:
    """One source as the user names it.

    Attributes:
        name: that was given.
        parts: files or splits of it.
        named: how its rows ask, for a source of `NAMED_SOURCES`.
    """

    name: str
    parts: Sequence[Records]
    named: NamedSource | None = None

    @property
    def done_percent(self) -> int:
        """How much of it is read."""
        done, total = (sum(getattr(p, n) for p in self.parts) for n in ("done_bytes", "num_bytes"))
        return 100 * done // max(1, total)

    def __iter__(self) -> Iterator[Record | Malformed]:
        index = 0
        for part in self.parts:
            for found in part:
                if self.named is None or isinstance(found, Malformed):
                    yield found
                    continue
                try:
                    value = self.named.record(index, found.value)
                except (KeyError, TypeError, IndexError, ValueError) as error:
                    raise ValueError(
                        f"{found.where} is no record of {self.name} as it was published "
                        f"({type(error).__name__}: {error}); restore the file"
                    ) from error
                index += 1
                if value is not None:
                    yield replace(found, value=value)


class DataSetRecords:
    """Rows of a split of a `datasets` data set; `num_bytes` counts rows."""

    def __init__(self, name: str, rows: Any):
        """Name the split, for messages."""
        self._name, self._rows = name, rows
        self.num_bytes, self.done_bytes = len(rows), 0

    def identity(self) -> dict[str, Any]:
        """Name, number of rows, and the fingerprint that `datasets` gives them."""
        return {
            "data_set": self._name,
            "rows": len(self._rows),
            "fingerprint": self._rows._fingerprint,
        }

    def __iter__(self) -> Iterator[Record]:
        for index, row in enumerate(self._rows):
            self.done_bytes = index + 1
            yield Record(f"{self._name}#{index}", row)


def open_source(
    name: str,
    *,
    form: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    data_dir: Path | None = None,
) -> QuerySource:
    """Find a source: a name of `NAMED_SOURCES`, else a file or folder, else a data set of the hub.

    A folder is one that `datasets` saved, or one of logs (its `.jsonl` and `.jsonl.gz` files), or
    one that `datasets` can load.

    Args:
        name: of it; `./sgd` is the folder where `sgd` is the named source.
        form: of files, as `form_of` takes it.
        split: of a data set; train unless it has only another one.
        subset: of a data set of the hub, which some need.
        data_dir: where the files of named sources are looked for before the hub is asked.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: there is, but it is not to be read so.
    """
    if name in NAMED_SOURCES:
        return _named(name, data_dir)
    path = find_path(name, f"a file, a folder or one of {', '.join(NAMED_SOURCES)}")
    if isinstance(path, str):
        return QuerySource(name, [_from_hub(name, {"path": path, "name": subset, "split": split})])
    if path.is_dir():
        return QuerySource(name, _folder(path, form, split))
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a folder; write it to a file first")
    return QuerySource(name, [FileRecords(path, form)])


def _named(name: str, data_dir: Path | None) -> QuerySource:
    source = NAMED_SOURCES[name]
    if data_dir is not None and (data_dir / source.file).is_file():
        return QuerySource(name, [FileRecords(data_dir / source.file)], source)
    require_data_dir(data_dir)
    if source.hub is None:
        raise FileNotFoundError(
            f"source {name!r}: {source.file} is not in {data_dir or 'any data folder'}, nor is it "
            f"on the hub; set {DATA_DIR_VARIABLE} to a folder that holds it (the original is "
            f"{source.published})"
        )
    find_path(HUB + source.hub["path"], "")  # says so
    return QuerySource(name, [_from_hub(name, source.hub)], source)


def _folder(path: Path, form: str | None, split: str | None) -> list[Records]:
    if any((path / name).is_file() for name in _SAVED_TO_DISK):
        from datasets import load_from_disk

        return [_split_of(str(path), load_from_disk(str(path)), split)]
    logs = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
    if logs:
        return [FileRecords(log, form) for log in logs]
    return [_from_hub(str(path), {"path": str(path), "split": split})]


def _from_hub(name: str, arguments: Any) -> Records:
    from datasets import load_dataset

    try:
        loaded = load_dataset(**arguments)
    except Exception as error:  # the hub, the network and the file formats each raise their own
        raise FileNotFoundError(
            f"{name!r} is no file, folder or named source ({', '.join(NAMED_SOURCES)}), and could "
            f"not be read as a data set: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return _split_of(name, loaded, arguments.get("split"))


def _split_of(name: str, loaded: Any, split: str | None) -> Records:
    if not isinstance(loaded, dict):
        return DataSetRecords(name, loaded)
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded or (split is None and chosen != "train" and len(loaded) > 1):
        raise ValueError(f"{name} has the splits {', '.join(loaded)}; give one of them as --split")
    return DataSetRecords(f"{name}:{chosen}", loaded[chosen])
