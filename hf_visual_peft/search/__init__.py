"""Search for a small adapter inside a large one: a supernet, and evolution under a cap on trained parameters.

    space = read_space("noah")                       # or a file, or a mapping
    supernet = Supernet(space.put_on(base), space)   # the largest adapter; each training step runs a part of it
    ...                                              # train `supernet` as any model
    found = evolve(supernet.subnets, supernet.accuracy_on(validation), max_parameters=100_000, record="search.json")
    model = supernet.extract(found.choice)           # an ordinary peft model with the adapter that was found

`recipes/search.py` does all of it.
"""

from .evolution import Found, evolve
from .reading import read_space
from .spaces import Space
from .subnets import Choice, Gene, Subnets
from .supernet import Supernet


__all__ = ["Choice", "Found", "Gene", "Space", "Subnets", "Supernet", "evolve", "read_space"]
