"""Tells the path of a model's folder from the name of a model on a hub."""

from pathlib import Path

from core.errors import UserError


def model_folder(model: str) -> Path | None:
    """The absolute path of the folder that `model` names; none for `default` and for the name of a model on a hub.

    Raises `UserError` where `model` is a path and no model is there.
    """
    if model == "default":
        return None
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "/", "~")) or path.exists() or model.count("/") > 1
    if not looks_like_path:
        return None
    if not (path / "config.json").is_file():
        raise UserError(f"--model: no config.json in {model!r}; give the folder of a saved model or a hub name")
    return path.resolve()
