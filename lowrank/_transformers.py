"""Meet transformers without importing it: `import lowrank` stays light, and the order is free.

``import lowrank`` must teach ``from_pretrained`` the method "lowrank", yet transformers may be
imported later, or never. So the plug-in (`lowrank.hf`) is loaded at once if transformers' models
are loaded, and otherwise right after they are, by a finder on ``sys.meta_path`` that then leaves.

After ``lowrank setup`` every Python of the environment runs this file when it starts, without the rest of
the library (`lowrank.cli.startup`). So it imports nothing at that time that takes a millisecond.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as type checkers know it; importing `typing` takes milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TRIGGER = "transformers.modeling_utils"


def plugin() -> ModuleType | None:
    """Return `lowrank.hf` if transformers' models are loaded in this process, else ``None``."""
    return load_plugin() if _TRIGGER in sys.modules else None


def load_plugin() -> ModuleType:
    """Return `lowrank.hf`, importing transformers if need be."""
    import importlib

    return importlib.import_module("lowrank.hf")


def watch() -> None:
    """Load `lowrank.hf` now, or as soon as ``transformers.modeling_utils`` has been imported."""
    if plugin() is None:
        sys.meta_path.insert(0, PluginFinder())


class PluginFinder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPlugin(spec.loader)  # type: ignore[assignment]
        return spec


class _ThenPlugin:
    """Run the real loader, then import the plug-in."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            plugin()
        except ImportError as error:  # a transformers that the plug-in does not fit must still import
            if error.name == "lowrank":
                return  # it has been uninstalled since `lowrank setup`
            import warnings

            message = (
                f"lowrank's plug-in does not fit this transformers ({error}); checkpoints will not load."
            )
            warnings.warn(message, stacklevel=2)
