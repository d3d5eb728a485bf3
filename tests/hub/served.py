"""A local web server for a folder, and one with broken responses."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        type(self).asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(folder, answer=None):
    """Yield (URL, list of the requested paths).

    Args:
        answer: bytes, status line included, to send in place of any file before the connection is closed.
    """
    asked = []

    def do_GET(self):
        asked.append(self.path)
        self.wfile.write(answer)
        self.close_connection = True

    handler = type("Handler", (_Quiet,), {"asked": asked} | ({} if answer is None else {"do_GET": do_GET}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
