"""On PYTHONPATH: Python starts without PyTorch, which requirements.txt does not ask for."""

from importlib.machinery import PathFinder

whole = PathFinder.find_spec


def find_spec(cls: type, name: str, *where: object) -> object:
    return None if name == "torch" else whole(name, *where)


PathFinder.find_spec = classmethod(find_spec)
