"""The methods for class texts; one method, one file."""

import importlib
import pkgutil


def load_methods() -> None:
    """Import every file of this room: each registers its method."""
    for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        importlib.import_module(module.name)
