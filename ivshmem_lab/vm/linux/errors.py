"""What can go wrong on the way to a Linux guest."""

from __future__ import annotations

from ...errors import GuestError


class LinuxImageError(GuestError):
    """The image of a Linux guest could not be fetched, built or read."""
