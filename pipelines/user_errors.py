"""A user's error ends the job, because no restart can fix it.

Flink restarts a job after any exception from Python, as often as the restart strategy allows. It gives up at once only
for an exception whose Java class says so, and Python cannot raise one. So the Python operators send the error's line to
a side output, and a Java operator there throws the exception. Flink compiles that operator from its source on each
worker, as it compiles the code that it generates for a query: the project needs no Java build.
"""

from typing import Any

from pyflink.datastream import DataStream, StreamExecutionEnvironment
from pyflink.java_gateway import get_gateway

from operators.flink.rows import USER_ERRORS

_CLASS = "EndJob"
_SOURCE = """
import org.apache.flink.runtime.execution.SuppressRestartsException;
import org.apache.flink.streaming.api.graph.StreamConfig;
import org.apache.flink.streaming.api.operators.OneInputStreamOperator;
import org.apache.flink.streaming.api.operators.Output;
import org.apache.flink.streaming.runtime.streamrecord.StreamRecord;
import org.apache.flink.streaming.runtime.tasks.ProcessingTimeService;
import org.apache.flink.streaming.runtime.tasks.StreamTask;
import org.apache.flink.table.runtime.operators.TableStreamOperator;

public class EndJob extends TableStreamOperator implements OneInputStreamOperator {
    public EndJob(Object[] references, StreamTask task, StreamConfig config, Output output, ProcessingTimeService time)
            throws Exception {
        setup(task, config, output);
        setProcessingTimeService(time);
    }

    public void processElement(StreamRecord line) {
        throw new SuppressRestartsException(new IllegalArgumentException((String) line.getValue()));
    }
}
"""


def end_on_user_errors(env: StreamExecutionEnvironment, stream: DataStream, of: str) -> None:
    """Let a line in the side output `USER_ERRORS` of `stream`'s operator end the job; `of` is that operator's name.

    This runs in the operator's task, so a line ends the task before its next checkpoint. A resumed job reads again what
    the operator took in since the checkpoint before.
    """
    jvm = get_gateway().jvm
    lines = stream._j_data_stream.getSideOutput(USER_ERRORS.get_java_output_tag())
    nothing = get_gateway().new_array(jvm.java.lang.Object, 0)
    configuration = jvm.org.apache.flink.configuration.Configuration()
    generated = jvm.org.apache.flink.table.runtime.generated.GeneratedOperator(_CLASS, _SOURCE, nothing, configuration)
    operator: Any = jvm.org.apache.flink.streaming.api.transformations.OneInputTransformation(
        lines.getTransformation(),
        f"user-errors-of-{of}",
        jvm.org.apache.flink.table.runtime.operators.CodeGenOperatorFactory(generated),
        USER_ERRORS.type_info.get_java_type_info(),
        lines.getTransformation().getParallelism(),
        False,
    )
    operator.setUid(f"user-errors-of-{of}")
    env._j_stream_execution_environment.addOperator(operator)
