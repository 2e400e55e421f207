"""Makes the paths in a job's configuration absolute."""

from core.model_path import model_folder
from operators.config import JobConfig


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """`job` with absolute paths of the model's folder, the profile and the logging file.

    The job's workers run in another working directory than the command that submits it. Raises `UserError` where
    `--model` is a path and no model is there. The name of a model on a hub is left as it is: only loading it shows
    whether it exists.
    """
    found: dict[str, object] = {}
    folder = model_folder(job.engine.model)
    if folder is not None:
        found["model"] = str(folder)
    if job.engine.profile is not None:
        found["profile"] = job.engine.profile.expanduser().resolve()
    slot_logging = None if job.slot_logging is None else job.slot_logging.expanduser().resolve()
    return job.model_copy(update={"slot_logging": slot_logging, "engine": job.engine.model_copy(update=found)})
