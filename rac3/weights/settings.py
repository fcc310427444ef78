"""The settings in the config file of a published checkpoint, each read with the type that it must have."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rac3.config import InputError, quoted
from rac3.weights.checkpoint_files import read_json

LARGEST = 2**31 - 1  # of a setting: no layer is larger
MOST_NUMBERS = 100  # in a list of settings, such as one for each level
DEEPEST = 100  # settings inside each other
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The settings of a file, or of one section of it.

    Attributes:
      file: for messages.
      values: the settings by name. One that is None counts as absent.
      section: the path of the section, such as `model.params.`, for messages.
    """

    file: Path
    values: Mapping[str, Any]
    section: str = ""

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The setting `name`, or its default. An int will do for a float.

        Raises:
          InputError: it has another type, or is absent and has no default.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{self.file}: {self.section}{name}={quoted(value)} is not of type {kind.__name__}; give the "
                "model's own config"
            )
        if isinstance(value, int) and abs(value) > LARGEST:
            raise InputError(
                f"{self.file}: {self.section}{name}={quoted(value)} is too large; give the model's own config"
            )
        return value

    def numbers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A list of whole numbers, or its default."""
        if self.values.get(name) is None and default is not None:
            return default
        value = self.get(name, list)
        if len(value) > MOST_NUMBERS or not all(type(number) is int and abs(number) <= LARGEST for number in value):
            raise InputError(
                f"{self.file}: {self.section}{name}={quoted(value)} is not a list of whole numbers; give the "
                "model's own config"
            )
        return tuple(value)

    def part(self, name: str, default: dict[str, Any] | None = None) -> "Settings":
        """The settings in the section `name`, or the default ones."""
        return Settings(self.file, self.get(name, dict, default), f"{self.section}{name}.")

    def require(self, **wanted: object) -> None:
        """Refuses any value but the one that our module has; an absent setting is as wanted."""
        for name, value in wanted.items():
            if (found := self.values.get(name)) not in (None, value):
                raise InputError(
                    f"{self.file}: {self.section}{name}={quoted(found)} is not supported, only {value!r}; use another "
                    "checkpoint"
                )


def read_settings(path: Path) -> Settings:
    """The settings of a JSON or a YAML file, by its suffix.

    Raises:
      InputError: the file is neither, or does not hold settings by name.
    """
    if path.suffix == ".json":
        return Settings(path, read_json(path))
    import yaml

    try:
        values = yaml.load(path.read_bytes(), _loader())  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}); download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings by name; download it again")
    return Settings(path, values)


def _loader() -> Any:
    """A loader of plain data whose work is bounded by the length of the file.

    Aliases stand for single values only: a few that stand for lists of each other grow to billions of settings.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias = self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST:
                raise yaml.YAMLError(f"settings are more than {DEEPEST} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and not isinstance(node, yaml.ScalarNode):
                raise yaml.YAMLError("an alias stands for more than one value; write the values out")
            return node

    return Loader
