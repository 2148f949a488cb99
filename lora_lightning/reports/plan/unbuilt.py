"""What can be told of a model that cannot be built without its weights: what its files say of themselves."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_lightning.reports.plan.setting import Setting


def told_of_files(setting: Setting) -> str:
    """The size of the base, and of an adapter on every matrix, from the headers of the files; no weight is read.

    Args:
        setting: Of a model that lies in a folder; of others, and of files that cannot be read, less is told.
    """
    folder = Path(setting.model.name).expanduser()
    kinds = (sorted(folder.glob(kind)) for kind in ("*.safetensors", "*.bin")) if folder.is_dir() else ()
    files = next(filter(None, kinds), [])  # of two forms of the same weights, one
    if not files:
        return "nothing more can be told without its layers"
    size = sum(path.stat().st_size for path in files)
    base = f"its files of weights are {size / 1e9:.3g} GB, which the base takes on a device"
    try:
        sides = [shape for path in files for shape in _matrices(path)]
    except SafetensorError:
        sides = []
    if not sides:
        return f"{base}; an adapter's size needs the shapes of the layers"
    most = sum(setting.lora.r * (rows + columns) for rows, columns in sides)
    return (
        f"{base}, and an adapter of rank {setting.lora.r} on all of its {len(sides)} matrices has {most:,} parameters"
    )


def _matrices(path: Path) -> list[tuple[int, int]]:
    """The shapes of a file's weights with two dimensions."""
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # not a dict
    return [(shape[0], shape[1]) for shape in shapes if len(shape) == 2]
