"""The mathematics of Masked Autoencoders: models, masking, targets, schedules and metrics, on torch and numpy alone.

Everything here is a function of its arguments. Nothing reads or writes files, looks at the clock or the environment, or
draws from a global random generator.

`mae_core.public` lists the names that this module offers. The shape letters in their documentation are those of the module
that defines them; the common ones are B images, C channels, H x W pixels, P the side of a patch, L patches per image, K of them
visible, N values per patch, D the width of a token, n class tokens."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_core.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public names when one is first asked for: torch takes seconds, and commands that only read do without it."""
    # not `from mae_core import public`, which would ask here for `public` again
    public = importlib.import_module("mae_core.public")
    if name.startswith("_") or not hasattr(public, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)
