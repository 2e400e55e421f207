"""The Kafka admin client inside Flink's connector, with properties from JSON lines on stdin.

Prints one line for each: the topics that it sees, or its error.
"""

import json
import sys

from py4j.protocol import Py4JJavaError
from pyflink.java_gateway import get_gateway

from pipelines.kafka_security import SHADED


def main() -> None:
    jvm = get_gateway().jvm
    for line in sys.stdin:
        properties = jvm.java.util.Properties()
        for name, value in json.loads(line).items():
            properties.setProperty(name, value)
        print(json.dumps(topics(jvm, properties)))  # noqa: T201


def topics(jvm, properties) -> list[str] | str:
    admin_class = jvm.java.lang.Class.forName(f"{SHADED}org.apache.kafka.clients.admin.Admin")
    create = next(
        method
        for method in admin_class.getMethods()
        if method.getName() == "create" and "Properties" in method.toString()
    )
    try:
        admin = create.invoke(None, jvm_array(jvm, properties))
        try:
            return sorted(admin.listTopics().names().get())
        finally:
            admin.close()
    except Py4JJavaError as error:
        cause = error.java_exception
        while cause.getCause() is not None:
            cause = cause.getCause()
        return cause.toString()


def jvm_array(jvm, value):
    array = get_gateway().new_array(jvm.java.lang.Object, 1)
    array[0] = value
    return array


if __name__ == "__main__":
    main()
