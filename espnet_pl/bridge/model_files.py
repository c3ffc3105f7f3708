"""The files of a trained model: in a folder, or in a zip that is unpacked with care."""

import contextlib
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import yaml

from espnet_pl.methods.base import ConfigError


class Files(NamedTuple):
    """Where a model is."""

    config: Path
    weights: Path
    root: Path | None = None  # of an unpacked zip

    def beside(self, named: str, usual: str) -> Path | None:
        """A file that the configuration names, which may have been made in another place.

        Args:
            usual: the name by which an exported model has it.
        """
        folder, name = self.config.parent, Path(named).name
        # Packed by the name it had there, which may begin elsewhere than in the configuration.
        packed = sorted(self.root.rglob(name)) if self.root else []
        places = [folder / name, folder / usual, *packed, Path(named)]
        return next((place for place in places if place.is_file()), None)


@contextlib.contextmanager
def found(path: Path, what: str = "teacher") -> Iterator[Files]:
    """The files of a model, unpacked while they are needed.

    Args:
        path: a model folder (``config.yaml``, ``model.pth``), a file of weights beside its
            ``config.yaml``, or a zip made by ``espnet2.bin.pack``.
        what: the model is, for messages.

    Raises:
        ConfigError: a file is missing, or the zip is not safe to unpack.
    """
    if path.suffix == ".zip" and path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            yield _unpacked(path, Path(folder))
        return
    folder, weights = (path.parent, path) if path.suffix == ".pth" else (path, path / "model.pth")
    config = folder / "config.yaml"
    if path.suffix == ".zip" or not config.is_file():
        lost = path if path.suffix == ".zip" else config
        raise ConfigError(f"{what}: {lost} is missing; give an exported model folder")
    if not weights.is_file():
        others = sorted(map(str, folder.glob("*.ave*.pth"))) + sorted(
            map(str, folder.glob("valid.*.best.pth"))
        )
        which = f"one of {', '.join(others)}" if others else "an exported model folder"
        raise ConfigError(f"{what}: {weights} is missing; give {which}")
    yield Files(config, weights)


def _unpacked(path: Path, root: Path) -> Files:
    """Every member below ``root``, or none at all; ESPnet's own unpacking trusts the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename
                parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
                absolute = name.startswith(("/", "\\")) or PureWindowsPath(name).drive
                if absolute or ".." in parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise ConfigError(
                        f"teacher: {path} is not safe to unpack: it has a member {name!r}"
                    )
            names = archive.namelist()
            packed = next((name for name in names if Path(name).name == "meta.yaml"), None)
            if packed is None:
                raise ConfigError(f"teacher: {path} has no meta.yaml; pack with espnet2.bin.pack")
            meta = yaml.safe_load(archive.read(packed))
            found = []
            for group, key in (("yaml_files", "asr_train_config"), ("files", "asr_model_file")):
                named = meta.get(group) if isinstance(meta, dict) else None
                # ESPnet names a file outside of its folder by the whole path, zip without the /.
                name = str((named if isinstance(named, dict) else {}).get(key)).lstrip("/")
                if name not in names:
                    raise ConfigError(f"teacher: {path} has no {key} where its meta.yaml says")
                found.append(root / name)
            archive.extractall(root)
    except (zipfile.BadZipFile, yaml.YAMLError) as error:
        raise ConfigError(f"teacher: {path} is no packed model: {error}") from None
    return Files(*found, root)
