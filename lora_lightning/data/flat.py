"""Examples stored flat, in a few large arrays that may lie in files and are then read where they lie.

A list of tensors costs some kilobyte an example beside its tokens, and each process of workers its own copy of it. Flat
arrays cost their tokens; memory-mapped ones are pages of a file, which all processes share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from lora_lightning.data.checksum import crc32, pieces
from lora_lightning.data.encode import Example

OFFSETS = "offsets"
_DTYPES = {"int32": torch.int32, "int64": torch.int64}


class FlatRows(Sequence[Example]):
    """Examples in flat arrays.

    Args:
        fields: What each token has, all examples behind one another, (tokens,); or each example, (examples,), for the
            names in ``single``.
        offsets: Where each example begins, and the end of the last, (examples + 1,) int64.
        single: Names of fields that an example has one of.
        folder: Where the arrays lie, if they do: they are then opened again instead of copied when this is pickled.
    """

    def __init__(
        self, fields: Mapping[str, Tensor], offsets: Tensor, single: Sequence[str] = (), folder: Path | None = None
    ) -> None:
        self.fields = dict(fields)
        self.offsets = offsets
        self.single = tuple(single)
        self.folder = folder

    @classmethod
    def of(cls, examples: Sequence[Example]) -> FlatRows:
        """The same examples, flat and in memory."""
        if not examples:
            return cls({}, torch.zeros(1, dtype=torch.int64))
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        single = [name for name, first in examples[0].items() if first.ndim == 0]
        fields = {
            name: (torch.stack if name in single else torch.cat)([example[name] for example in examples])
            for name in examples[0]
        }
        return cls(fields, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), single)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} examples, and none has the number {number}")
        place = number % len(self)
        begin, end = self.offsets[place : place + 2].tolist()
        # Copies: a view that is pickled, as for another process, takes the whole array along.
        return {
            name: (array[place] if name in self.single else array[begin:end]).clone()
            for name, array in self.fields.items()
        }

    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return self.offsets.diff().tolist()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the arrays into a folder, a file each.

        Returns:
            What `load` needs to know, fit for JSON.
        """
        folder.mkdir(parents=True)
        arrays = {**self.fields, OFFSETS: self.offsets}
        for name, array in arrays.items():
            array.contiguous().numpy().tofile(_file(folder, name))
        described = _described(arrays)
        for name, about in described.items():
            about["crc32"] = crc32(pieces(_file(folder, name)))
        return {"arrays": described, "single": list(self.single)}

    @classmethod
    def load(cls, folder: Path, about: Mapping[str, Any], *, check: bool = True) -> FlatRows:
        """Map the arrays of a folder into memory.

        Args:
            folder: Where `save` wrote them.
            about: What it returned.
            check: Read the files through, whether they are what was written.

        Raises:
            ValueError: If a file is not what was written.
            OSError: If it cannot be read.
        """
        arrays = {}
        for name, each in about["arrays"].items():
            dtype, size = _DTYPES[each["dtype"]], int(each["size"])
            path = _file(folder, name)
            if path.stat().st_size != size * dtype.itemsize:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size * dtype.itemsize}")
            if check and crc32(pieces(path)) != each["crc32"]:
                raise ValueError(f"the content of {path} is not what was written")
            # Private: what is written to an example by accident reaches neither the file nor another process.
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else None
            arrays[name] = torch.empty(0, dtype=dtype) if mapped is None else mapped
        offsets = arrays.pop(OFFSETS)
        return cls(arrays, offsets, about["single"], folder)

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            return vars(self)
        about = {"arrays": _described({**self.fields, OFFSETS: self.offsets}), "single": self.single}
        return {"folder": self.folder, "about": about}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "about" in state:
            state = vars(FlatRows.load(state["folder"], state["about"], check=False))
        vars(self).update(state)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _described(arrays: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": str(array.dtype).removeprefix("torch."), "size": len(array)} for name, array in arrays.items()
    }
