"""The most memory that tensors take at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once among those that are made inside; `own` are not counted."""

    def __init__(self, own: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.own, self.bytes = {t.untyped_storage().data_ptr() for t in own}, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.own:
                reference = StorageWeakRef(storage)
                self.alive[reference.cdata] = reference, storage.nbytes()
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return found
