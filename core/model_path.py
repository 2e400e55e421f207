"""Whether a model is meant by its path, and which folder that is; and the other files that a job's workers read."""

from pathlib import Path

from core.config import JobConfig
from core.errors import UserError


def model_folder(model: str) -> Path | None:
    """The absolute folder that `model` names; none for `default` and for a name on a hub.

    Raises `UserError` where it is a path and no model is there.
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


def with_model_found(job: JobConfig) -> JobConfig:
    """`job` with absolute paths of all that its workers read, as they have another working directory.

    Raises `UserError` as `model_folder` does; a hub's name can only be checked by loading it.
    """
    found: dict[str, object] = {}
    folder = model_folder(job.engine.model)
    if folder is not None:
        found["model"] = str(folder)
    if job.engine.profile is not None:
        found["profile"] = job.engine.profile.expanduser().resolve()
    slot_logging = None if job.slot_logging is None else job.slot_logging.expanduser().resolve()
    return job.model_copy(update={"slot_logging": slot_logging, "engine": job.engine.model_copy(update=found)})
