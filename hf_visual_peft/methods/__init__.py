"""The methods. Folders follow the taxonomy of the survey (arXiv 2402.02242); one method, one file."""

import importlib
import pkgutil

from ..core import tuner  # noqa: F401 - methods register with the tuner that is there


def load_methods() -> None:
    """Import every file of this room: each registers its method."""
    for module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        importlib.import_module(module.name)
