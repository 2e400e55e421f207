"""Finds the cause of a failure in a stack trace of Java or Python."""

JAVA_ERROR = "py4j.protocol.Py4JJavaError"
"""This exception only says that the cause was in Java."""


def root_cause(text: str) -> str:
    """The line of a stack trace or log that names the cause: the Python exception, else the innermost Java cause."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error: ")]
    if own:
        return own[-1].removeprefix("error: ")
    tracebacks = [index for index, line in enumerate(lines) if line.endswith("Traceback (most recent call last):")]
    if tracebacks:
        for line in lines[tracebacks[-1] + 1 :]:
            if line.startswith(JAVA_ERROR):
                break
            if not line.startswith((" ", "\t")):
                return line
    causes = [line.strip() for line in lines if line.lstrip().startswith("Caused by: ")]
    if causes:
        return causes[-1].removeprefix("Caused by: ")
    # The text of a `Py4JJavaError` names the call in its first line, and the error after it.
    raised = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    if raised:
        return raised[-1]
    unindented = [line for line in lines if not line.startswith((" ", "\t"))]
    return (unindented or lines or ["no reason was given"])[0]
