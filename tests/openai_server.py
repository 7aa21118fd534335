"""A server on loopback with the interface of OpenAI's chat completions, whose every reply the test decides."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`act(request, number) -> text` is the reply; or it takes over by returning a function of the handler."""

    daemon_threads = True

    def __init__(self, act):
        super().__init__(("127.0.0.1", 0), Handler)
        self.act, self.seen, self.lock = act, [], threading.Lock()
        self.running = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append(request)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            what = server.act(request, number)
            what(self) if callable(what) else self.reply(200, completion(what))
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def completion(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": usage}
