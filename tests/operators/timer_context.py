"""What the functions under test need of Flink besides state: their place, their key, and timers, which it collects."""

KEY = 7


class TimerContext:
    """Runtime and timer context in one; `key` is the current one."""

    def __init__(self) -> None:
        self.key = KEY
        self.processing: list[int] = []
        self.event: list[int] = []

    def get_index_of_this_subtask(self) -> int:
        return 0

    def get_current_key(self) -> int:
        return self.key

    def timer_service(self) -> "TimerContext":
        return self

    def register_processing_time_timer(self, at_ms: int) -> None:
        self.processing.append(at_ms)

    def register_event_time_timer(self, at_ms: int) -> None:
        self.event.append(at_ms)
