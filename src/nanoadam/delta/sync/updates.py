"""Updates with numbers: a sender that counts them, and receivers that notice one that is lost or comes twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nanoadam.delta.application import Application
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.patch import Patch
from nanoadam.delta.recorder import Recorder
from nanoadam.delta.sync.coordinates import Coordinates


class OutOfStep(DeltaError):
    """A receiver lacks an update that came before this one: it needs a reseed. Nothing was changed."""


@dataclass(frozen=True)
class Update:
    """One step of a model's weights.

    Attributes:
        version: of the weights afterwards.
        previous: of the weights before, which the receiver must have. None for a reseed, which holds every tensor.
        patch: what changes.
    """

    version: int
    previous: int | None
    patch: Patch


class Channel(Protocol):
    """How updates get from a sender to its receivers."""

    def send(self, update: Update) -> bool:
        """Send an update.

        Returns:
            False if a receiver has said that it could not apply it, or the last one.
        """

    def receive(self, version: int) -> Update | None:
        """The next update for a receiver that has `version` (-1: none): None if there is none yet.

        Raises:
            OutOfStep: if the next one is gone.
        """

    def confirm(self, version: int) -> None:
        """Say which version a receiver has after an update (-1: it needs a reseed), where the channel can."""

    def latest(self) -> int:
        """The newest version that was sent; 0 if there is none."""


class Sender:
    """The trainer's side.

    Args:
        recorder: of the model that is trained.
        channel: to the servers.
        coordinates: how checkpoints name what the model has fused, if it has.

    Attributes:
        version: of the last update.
    """

    def __init__(self, recorder: Recorder, channel: Channel, coordinates: Coordinates | None = None) -> None:
        self.recorder, self.channel, self.coordinates = recorder, channel, coordinates
        self.version = channel.latest()
        self._seed = self.version > 0  # weights of an earlier process: these may be others

    def send(self) -> Update:
        """Send what has moved since the last time; everything, if a receiver could not follow.

        Raises:
            DeltaError: as `Recorder.patch`.
        """
        if self._seed:
            return self.reseed()
        return self._send(self.recorder.patch(copy=False), self.version)

    def reseed(self) -> Update:
        """Send every tensor whole, for receivers whatever they have.

        Raises:
            DeltaError: as `Recorder.patch`.
        """
        self.recorder.reseed()
        return self._send(self.recorder.patch(copy=False), None)

    def _send(self, patch: Patch, previous: int | None) -> Update:
        if self.coordinates is not None:
            patch = self.coordinates.patch(patch)
        update = Update(self.version + 1, previous, patch)
        self._seed = True  # unless it arrives
        self._seed = not self.channel.send(update)
        self.version = update.version
        return update


class Receiver:
    """A server's side: a model that follows.

    Args:
        model: a module or state dict, under the names that the sender uses.
        channel: from the trainer; or hand updates to `apply` yourself.
        version: of the weights that the model has. 0 is the model that training began with.
        verify: hold each tensor against its hashes, before and after.

    Attributes:
        version: of the weights that the model has; -1 when it needs a reseed.
    """

    def __init__(self, model: Any, channel: Channel | None = None, *, version: int = 0, verify: bool = True) -> None:
        self.model, self.channel, self.version, self.verify = model, channel, version, verify

    def receive(self) -> bool:
        """Wait for the channel's next update, and apply it.

        Returns:
            Whether the weights have changed.

        Raises:
            OutOfStep: if an update is missing. The channel's sender is told, and will reseed where it can be told.
            DeltaError: if the update does not fit the model, which is as it was.
        """
        assert self.channel is not None
        update = self.channel.receive(self.version)
        if update is None:
            return False
        try:
            changed = self.apply(update)
        except BaseException:
            self.version = -1
            raise
        finally:
            self.channel.confirm(self.version)
        return changed

    @torch.no_grad()
    def apply(self, update: Update) -> bool:
        """Apply an update if it is the next one.

        Returns:
            False for one that the model has already.

        Raises:
            OutOfStep: if one before it is missing.
            DeltaError: if it does not fit the model. Nothing is changed in either case.
        """
        if update.previous is not None:
            if 0 <= update.version <= self.version:
                return False
            if update.previous != self.version:
                raise OutOfStep(
                    f"update {update.version} follows {update.previous}, and the model has "
                    f"{'none that is known' if self.version < 0 else self.version}: have the sender reseed"
                )
        Application(self.model, update.patch, 1.0, self.verify, keep=False).run()
        self.version = update.version
        return True
