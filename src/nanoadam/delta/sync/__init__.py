"""Keeping servers that generate in step with a trainer, by the weights that have moved.

```python
sender = Sender(Recorder(model, optimizer), GroupChannel(group, source=0))  # the trainer, after each step:
sender.send()

receiver = Receiver(model, GroupChannel(group, source=0))                   # each server
receiver.receive()
```

A channel is a torch.distributed group (`GroupChannel`: NCCL, gloo) or a folder that both can see (`FolderChannel`).
`weight_patches` gives what vLLM's `sparse_nccl` backend takes.
"""

from nanoadam.delta.sync.coordinates import Coordinates, Piece
from nanoadam.delta.sync.folder import FolderChannel
from nanoadam.delta.sync.group import GroupChannel
from nanoadam.delta.sync.updates import Channel, OutOfStep, Receiver, Sender, Update
from nanoadam.delta.sync.weights import SparseWeightPatch, apply_weight_patches, weight_patches

__all__ = [
    "Channel",
    "Coordinates",
    "FolderChannel",
    "GroupChannel",
    "OutOfStep",
    "Piece",
    "Receiver",
    "Sender",
    "SparseWeightPatch",
    "Update",
    "apply_weight_patches",
    "weight_patches",
]
