"""Serves a slot's metrics to Prometheus, from Flink's worker, which lives on while the slot's process hangs."""

import logging
import threading

from prometheus_client import CollectorRegistry, start_http_server

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""Time between two attempts while the port is taken, as it can be for a moment after a restart of the job."""


class MetricsEndpoint:
    """Serves a registry at a port as soon as the port is free. A port that is taken is logged, and fails nothing."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self._host = host
        self._port = port
        self._registry = registry
        self._closed = threading.Event()
        self.serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        told = False
        while not self._closed.is_set():
            try:
                server, thread = start_http_server(self._port, self._host, self._registry)
            except OSError as error:
                if not told:
                    logger.warning("metrics are not served at %s:%d: %s", self._host, self._port, error)
                told = True
                self._closed.wait(RETRY_S)
                continue
            self.serving.set()
            self._closed.wait()
            server.shutdown()
            server.server_close()
            thread.join()
