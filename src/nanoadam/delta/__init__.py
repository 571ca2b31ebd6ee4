"""Finetunes as patches: small to keep, exact to apply, exact to take back, cheap to send.

NanoAdam leaves most weights as they are, bit for bit. What it changed is a list of positions and values:

```python
from nanoadam import delta

patch = delta.diff("base-model", "finetuned-model", out="finetuned.safetensors")
delta.apply(model, "finetuned.safetensors")  # the finetuned model, in every bit
delta.revert(model)                          # the base again, in every bit
```

docs/delta-format.md describes the file.
"""

from nanoadam.delta.applying import applied, apply, revert
from nanoadam.delta.composing import compose
from nanoadam.delta.diffing import diff
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.format import FILE
from nanoadam.delta.inspecting import Verdict, info, verify
from nanoadam.delta.patch import Patch
from nanoadam.delta.recorder import Recorder
from nanoadam.delta.serving import Switch
from nanoadam.delta.sources import snapshot

__all__ = [
    "FILE",
    "DeltaError",
    "Entry",
    "Patch",
    "Recorder",
    "Switch",
    "Verdict",
    "applied",
    "apply",
    "compose",
    "diff",
    "info",
    "revert",
    "snapshot",
    "verify",
]
