"""Several GPUs: replicas that send only what changes.

```python
replica = nanoadam.distributed.replicate(model, optimizer)
for batch in my_share_of_the_data:
    model(**batch).loss.backward()   # gradients are exchanged while they are made
    optimizer.step()
    optimizer.zero_grad()
```
"""

from nanoadam.distributed.agreement import Drifted
from nanoadam.distributed.ddp import prepare_ddp
from nanoadam.distributed.replicas import Replica, replicate

__all__ = ["Drifted", "Replica", "prepare_ddp", "replicate"]
